"""Gates of curation: conditions after each step; the stage stops at a failed one and lists the rows.

Checks of rows cover all rows. Checks of similarities compute exact products of a sample of images with all others,
`SAMPLE_PAIRS` products in total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.data.expectations import (
    DataDocs,
    Examination,
    Mask,
    ValidationReport,
    examine_manifest,
    mask_of,
    sampled_rows,
)
from components.data.manifest import (
    CURATED_SCHEMA,
    MANIFEST,
    REJECTED,
    REJECTED_SCHEMA,
    read_manifest,
    read_table,
)

SAMPLE_PAIRS = 200_000_000
SAMPLE_IMAGES = 100  # minimum, regardless of the number of products
BLOCK = 2048  # rows of a product
MARGIN = 1e-4  # upper bound of the error of float32 products
DECIMALS = 6  # of similarities, as in curation
ORIGINS = ("seed", "retrieved", "balanced")

pc: Any = pyarrow.compute  # created at import, invisible to pyright


@dataclass(frozen=True)
class Embedded:
    """A subset of images of an embedding matrix, which may be memory-mapped."""

    images: pa.Table  # [R], with a column image_id
    vectors: NDArray[np.float32]  # [N, D] of unit norm
    rows: NDArray[np.int64]  # [R] ascending, those of the images


@dataclass(frozen=True)
class Limit:
    """Limit of the similarity of two images, and the share that may exceed it because an index missed pairs."""

    similarity: float  # cosine, inclusive
    allowed_share: float = 0.0


@dataclass(frozen=True)
class Balance:
    """Clusters of the top level, before and after sampling."""

    labels: NDArray[np.int64]  # [M] the cluster of each sampled image
    before: NDArray[np.int64]  # [C] candidates of each cluster
    max_share: float | None  # of the sample in one cluster; None: as before sampling


@dataclass(frozen=True)
class Drift:
    """An earlier curated set, and how far this one may differ."""

    sources: Mapping[str, int]  # images of each source in the earlier set
    max_source_shift: float  # change of any source's share
    size_ratio: tuple[float, float]  # minimum and maximum size relative to the earlier set


def after_filter(docs: DataDocs, images: pa.Table, min_side: int, licenses: Sequence[str] | None) -> None:
    """Check that images are distinct, large enough and under an allowed license (None: any).

    Raises:
        DatasetError: with the failing rows, as in all gates.
    """
    examination = Examination(images)
    _, inverse, counts = np.unique(images["image_id"].to_numpy().astype("S64"), return_inverse=True, return_counts=True)
    examination.rows("ids_unique", "no image_id is there twice", counts[inverse] > 1)
    sides = np.minimum(images["width"].to_numpy(), images["height"].to_numpy())
    examination.rows("large_enough", f"the shorter side has at least {min_side} pixels", sides < min_side)
    _check_licenses(examination, licenses)
    docs.judge(examination, "after the filters")


def after_dedup(docs: DataDocs, left: Embedded, limit: Limit) -> None:
    """Check that no two remaining images are similar."""
    failing, checked = alike(left, left, limit.similarity)
    examination = Examination(left.images)
    meaning = f"no other image that is left has a cosine above {limit.similarity:g}, else raise curate.num_neighbors"
    examination.sampled("no_duplicates", meaning, failing, checked, int(limit.allowed_share * checked))
    docs.judge(examination, "after deduplication")


def after_decontamination(docs: DataDocs, left: Embedded, evaluation: Embedded, limit: Limit) -> None:
    """Check that no remaining image is an evaluation image or similar to one."""
    examination = Examination(left.images)
    same = mask_of(pc.is_in(left.images["image_id"], evaluation.images["image_id"].combine_chunks()))
    examination.rows("no_evaluation_image", "no image_id of an evaluation set", same)
    failing, checked = alike(left, evaluation, limit.similarity)
    meaning = f"no evaluation image has a cosine above {limit.similarity:g}"
    examination.sampled("no_evaluation_copies", meaning, failing, checked, int(limit.allowed_share * checked))
    docs.judge(examination, "after decontamination")


def after_sampling(docs: DataDocs, drawn: pa.Table, balance: Balance) -> None:
    """Check that no cluster exceeds its share of the sample.

    Args:
        docs: receives the result.
        drawn: [M] manifest rows of the sample.
        balance: their clusters.
    """
    before = balance.before.max() / max(balance.before.sum(), 1)  # 0 where all images are seeds
    share = before if balance.max_share is None else balance.max_share
    most = int(np.ceil(share * len(balance.labels) - 1e-9))  # round up to whole images
    too_large = np.bincount(balance.labels, minlength=len(balance.before)) > most
    examination = Examination(drawn)
    meaning = f"no cluster has more than {share:.2%} of the sample"
    examination.rows("clusters_balanced", meaning, too_large[balance.labels])
    docs.judge(examination, "after sampling")


def all_accounted(docs: DataDocs, folder: Path, pool: pa.Table) -> None:
    """Check that each pool row is either in the curated set, perhaps with blurred faces, or rejected, and nothing else.

    Args:
        docs: receives the result.
        folder: the curated set.
        pool: all rows, with a column image_id.
    """
    kept, rejected = _pool_ids(read_manifest(folder / MANIFEST)), read_table(folder / REJECTED, REJECTED_SCHEMA)
    ids = pool["image_id"].to_numpy().astype("S64")
    listed = np.concatenate([kept.to_numpy(), rejected["image_id"].to_numpy()]).astype("S64")
    names, inverse = np.unique(np.concatenate([ids, listed]), return_inverse=True)
    in_pool = np.bincount(inverse[: len(ids)], minlength=len(names))
    in_tables = np.bincount(inverse[len(ids) :], minlength=len(names))
    examination = Examination(pool)
    examination.rows("accounted_for", "each row of the pool is in or out", (in_pool > in_tables)[inverse[: len(ids)]])
    examination.fact("nothing_else", "no more rows are in and out than in the pool", int((in_tables > in_pool).sum()))
    docs.judge(examination, "accounting")


def validate_curated(
    docs: DataDocs, folder: Path, licenses: Sequence[str] | None, drift: Drift | None
) -> ValidationReport:
    """Check the curated set: its rows, its bytes, and its difference from an earlier one.

    Args:
        docs: receives the result.
        folder: the curated set.
        licenses: allowed ones; None: any.
        drift: comparison with an earlier set; None: there is none.
    """
    table = read_manifest(folder / MANIFEST)
    examination = examine_manifest(table, folder)
    unknown = ~mask_of(pc.is_in(table["origin"], pa.array(ORIGINS)))
    examination.rows("origin_known", f"origin is one of {', '.join(ORIGINS)}", unknown)
    retrieved = mask_of(pc.equal(table["origin"], "retrieved"))
    unexplained = retrieved & mask_of(pc.or_(pc.is_null(table["query_id"]), pc.is_null(table["similarity"])))
    examination.rows("retrieval_explained", "a retrieved image names its query and similarity", unexplained)
    _check_licenses(examination, licenses)
    if drift is not None:
        _check_drift(examination, drift)
    return docs.judge(examination, "curated set", CURATED_SCHEMA)


def alike(left: Embedded, right: Embedded, threshold: float) -> tuple[Mask, int]:
    """Find the left images with a similarity above `threshold` to a right one other than itself, in a sample.

    Returns:
        [R] which fail, False outside of the sample; the sample size.
    """
    failing = np.zeros(len(left.rows), dtype=bool)
    sample_rows = sampled_rows(len(left.rows), max(SAMPLE_IMAGES, SAMPLE_PAIRS // max(len(right.rows), 1)))
    for queries in _blocks(sample_rows):
        vectors = left.vectors[left.rows[queries]]  # [q, D]
        for others in _blocks(right.rows):
            block = right.vectors[others]  # [b, D]
            products = vectors @ block.T
            if left is right:
                products[left.rows[queries][:, None] == others] = -1
            at, column = np.nonzero(products > threshold - MARGIN)
            cosine = np.einsum("ij,ij->i", vectors[at], block[column], dtype=np.float64).round(DECIMALS)
            failing[queries[at[cosine.astype(np.float32) > np.float32(threshold)]]] = True
    return failing, len(sample_rows)


def _blocks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]


def _check_licenses(examination: Examination, licenses: Sequence[str] | None) -> None:
    if licenses is not None:
        names = pa.array([name.lower() for name in licenses], pa.string())  # case-insensitive, as in the filter
        allowed = mask_of(pc.is_in(pc.utf8_lower(examination.table["license"]), names))
        examination.rows("license_allowed", f"license is one of {', '.join(licenses)}", ~allowed)


def _check_drift(examination: Examination, drift: Drift) -> None:
    sources = examination.table["source"].to_numpy()
    names, counts = np.unique(sources.astype(str), return_counts=True)
    before = sum(drift.sources.values())
    shifts = {
        str(name): count / len(sources) - drift.sources.get(name, 0) / before
        for name, count in zip(names, counts, strict=True)
    }
    moved = [name for name, shift in shifts.items() if abs(shift) > drift.max_source_shift]
    listed = ", ".join(f"{name} {shifts[name]:+.1%}" for name in moved)
    meaning = f"no source's share moved by more than {drift.max_source_shift:.0%}"
    meaning += f", but {listed}" if listed else ""
    examination.rows("sources_as_before", meaning, np.isin(sources, moved))
    lost = [name for name, count in drift.sources.items() if count / before > drift.max_source_shift]
    lost = [name for name in lost if name not in shifts]
    examination.fact("no_source_lost", f"no large source is gone ({', '.join(lost) or 'none is'})", len(lost))
    least, most = (ratio * before for ratio in drift.size_ratio)
    meaning = f"{least:.0f} to {most:.0f} images, because the set before had {before}, see curate.gates.size_ratio"
    outside = max(least - len(sources), len(sources) - most, 0)
    examination.fact("size_as_before", meaning, int(np.ceil(outside)))


def _pool_ids(manifest: pa.Table) -> pa.ChunkedArray:
    return pc.coalesce(manifest["derived_from"], manifest["image_id"])
