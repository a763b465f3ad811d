"""Filters on manifest columns and scores; each function returns the images that it rejects.

Ingest already rejects animated images.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.curation.config import CurationError, FilterConfig
from components.curation.rejections import rejections


def filter_images(pool: pa.Table, config: FilterConfig, scores: pa.Table) -> pa.Table:
    """Apply all filters; an image is rejected by the first that matches.

    Args:
        pool: a pool manifest.
        config: the limits.
        scores: rows of SCORES_SCHEMA for the same images in the same order.

    Raises:
        CurationError: a limit on a score that was not computed.
    """
    width, height = pool["width"].to_numpy(), pool["height"].to_numpy()
    parts = [repeated_rows(pool), too_small(width, height, config.min_side)]
    if config.max_aspect_ratio is not None:
        parts.append(too_long(width, height, config.max_aspect_ratio))
    if config.formats is not None:
        parts.append(other_format(pool["format"], config.formats))
    parts.append(blocked_domain(pool["source_uri"], config.blocked_domains))
    parts.append(blocked_path(pool["source_uri"], config.blocked_paths))
    parts.append(blocked_license(pool["license"], config.blocked_licenses))
    if config.allowed_licenses is not None:
        parts.append(not_allowed_license(pool["license"], config.allowed_licenses))
    if config.max_gray_share is not None:
        parts.append(grayscale(scores["gray_share"].to_numpy(), config.max_gray_share))
    if config.min_entropy is not None:
        parts.append(blank(scores["entropy"].to_numpy(), config.min_entropy))
    if config.max_nsfw is not None:
        parts.append(not_safe(_nsfw(scores), config.max_nsfw))
    rejected = pa.concat_tables(parts)
    first = np.unique(rejected["row"].to_numpy(), return_index=True)[1]
    return rejected.take(pa.array(first))


def repeated_rows(pool: pa.Table) -> pa.Table:
    """Reject images whose bytes are listed earlier, such as by two sources: `exact_duplicate`."""
    image_ids = pool["image_id"].to_numpy()
    first = np.unique(image_ids, return_index=True)[1]
    rows = np.setdiff1d(np.arange(len(image_ids)), first)
    similarity = np.ones(len(rows), np.float32)
    return rejections(rows, "exact_duplicate", "the same bytes are listed before", list(image_ids[rows]), similarity)


def too_small(width: NDArray[np.int32], height: NDArray[np.int32], min_side: int) -> pa.Table:
    """Reject images whose shorter side has fewer than `min_side` pixels: `too_small`."""
    rows = np.flatnonzero(np.minimum(width, height) < min_side)
    return rejections(rows, "too_small", [f"{width[r]} x {height[r]}, shorter side < {min_side}" for r in rows])


def too_long(width: NDArray[np.int32], height: NDArray[np.int32], max_ratio: float) -> pa.Table:
    """Reject images whose longer side is more than `max_ratio` times the shorter: `aspect_ratio`."""
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    rows = np.flatnonzero(longer > max_ratio * shorter)
    return rejections(rows, "aspect_ratio", [f"{width[r]} x {height[r]}, ratio > {max_ratio:g}" for r in rows])


def other_format(formats: pa.ChunkedArray, allowed: tuple[str, ...]) -> pa.Table:
    """Reject images that are in none of the `allowed` formats: `format`."""
    rows = np.flatnonzero(~_matches(formats, _any_of(allowed)))
    named = formats.take(pa.array(rows)).to_pylist()
    return rejections(rows, "format", [f"{name}, not {', '.join(allowed)}" for name in named])


def blocked_domain(uris: pa.ChunkedArray, domains: tuple[str, ...]) -> pa.Table:
    """Reject images whose URI has one of the `domains` or a subdomain as host or first folder: `blocked_source`."""
    before, after = r"(?i)^(?:[a-z][a-z0-9+.-]*://)?(?:[^/?#]*@)?(?:[^/?#@]*\.)?", r"\.?(?::\d*)?(?:[/?#]|$)"
    return _blocked(uris, {f"domain {name}": f"{before}{re.escape(name)}{after}" for name in domains})


def blocked_path(uris: pa.ChunkedArray, globs: tuple[str, ...]) -> pa.Table:
    """Reject images whose whole URI matches one of the `globs` (* any text, ? one character): `blocked_source`."""
    wild = {"*": ".*", "?": "."}
    patterns = {glob: "".join(wild.get(letter) or re.escape(letter) for letter in glob) for glob in globs}
    return _blocked(uris, {f"path {glob}": f"(?s)^{pattern}$" for glob, pattern in patterns.items()})


def blocked_license(licenses: pa.ChunkedArray, blocked: tuple[str, ...]) -> pa.Table:
    """Reject images under one of the `blocked` licenses: `license`."""
    return _licensed(licenses, _matches(licenses, _any_of(blocked)), "is blocked")


def not_allowed_license(licenses: pa.ChunkedArray, allowed: tuple[str, ...]) -> pa.Table:
    """Reject images under none of the `allowed` licenses; expressions must match literally: `license`."""
    return _licensed(licenses, ~_matches(licenses, _any_of(allowed)), "is not among those allowed")


def grayscale(share: NDArray[np.float32], highest: float) -> pa.Table:
    """Reject images with a share of gray pixels above `highest`: `grayscale`."""
    rows = np.flatnonzero(share > highest)
    return rejections(rows, "grayscale", [f"gray share {share[r]:.3f} > {highest:g}" for r in rows])


def blank(entropy: NDArray[np.float32], lowest: float) -> pa.Table:
    """Reject images whose luma has less than `lowest` bits of entropy: `blank`."""
    rows = np.flatnonzero(entropy < lowest)
    return rejections(rows, "blank", [f"entropy {entropy[r]:.2f} bits < {lowest:g}" for r in rows])


def not_safe(nsfw: NDArray[np.float32], highest: float) -> pa.Table:
    """Reject images with a classifier score above `highest`: `nsfw`."""
    rows = np.flatnonzero(nsfw > highest)
    return rejections(rows, "nsfw", [f"score {nsfw[r]:.3f} > {highest:g}" for r in rows])


def _nsfw(scores: pa.Table) -> NDArray[np.float32]:
    """Return [N] the classifier's score of every image."""
    if scores["nsfw"].null_count:
        missing = "curate.filters.max_nsfw needs a score that the stage embed did not compute"
        raise CurationError(
            f"{missing}: set embed.scores.nsfw (kind: opennsfw) and run it again, or leave max_nsfw out"
        )
    return scores["nsfw"].to_numpy()


def _blocked(uris: pa.ChunkedArray, patterns: dict[str, str]) -> pa.Table:
    parts = [rejections(np.zeros(0, np.int64), "blocked_source", "")]
    for detail, pattern in patterns.items():
        parts.append(rejections(np.flatnonzero(_matches(uris, pattern)), "blocked_source", detail))
    return pa.concat_tables(parts)


def _licensed(licenses: pa.ChunkedArray, refused: NDArray[np.bool_], why: str) -> pa.Table:
    rows = np.flatnonzero(refused)
    return rejections(rows, "license", [f"{name} {why}" for name in licenses.take(pa.array(rows)).to_pylist()])


def _any_of(names: tuple[str, ...]) -> str:
    """Return a case-insensitive pattern for the whole text; no names match nothing."""
    return f"(?i)^(?:{'|'.join(map(re.escape, names))})$" if names else "[^\\s\\S]"


def _matches(texts: pa.ChunkedArray, pattern: str) -> NDArray[np.bool_]:
    """Return [N] whether each text contains a match (RE2, in time linear in the text for any pattern)."""
    return pc.match_substring_regex(texts, pattern).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
