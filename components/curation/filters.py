"""Filters on what the manifest says of each image: each is one function that names the images it refuses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.curation.config import FilterConfig
from components.curation.rejections import rejections


def filter_images(pool: pa.Table, config: FilterConfig) -> pa.Table:
    """Rejections by all filters; an image is rejected by the first that refuses it.

    Args:
        pool: a pool manifest.
        config: the limits.
    """
    width, height = pool["width"].to_numpy(), pool["height"].to_numpy()
    parts = [repeated_rows(pool), too_small(width, height, config.min_side)]
    if config.max_aspect_ratio is not None:
        parts.append(too_long(width, height, config.max_aspect_ratio))
    rejected = pa.concat_tables(parts)
    first = np.unique(rejected["row"].to_numpy(), return_index=True)[1]
    return rejected.take(pa.array(first))


def repeated_rows(pool: pa.Table) -> pa.Table:
    """Images whose very bytes are listed before, such as by two sources: `exact_duplicate`."""
    image_ids = pool["image_id"].to_numpy()
    first = np.unique(image_ids, return_index=True)[1]
    rows = np.setdiff1d(np.arange(len(image_ids)), first)
    similarity = np.ones(len(rows), np.float32)
    return rejections(rows, "exact_duplicate", "the same bytes are listed before", list(image_ids[rows]), similarity)


def too_small(width: NDArray[np.int32], height: NDArray[np.int32], min_side: int) -> pa.Table:
    """Images whose shorter side has fewer than `min_side` pixels: `too_small`."""
    rows = np.flatnonzero(np.minimum(width, height) < min_side)
    return rejections(rows, "too_small", [f"{width[r]} x {height[r]}, shorter side < {min_side}" for r in rows])


def too_long(width: NDArray[np.int32], height: NDArray[np.int32], max_ratio: float) -> pa.Table:
    """Images whose longer side is more than `max_ratio` times the shorter: `aspect_ratio`."""
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    rows = np.flatnonzero(longer > max_ratio * shorter)
    return rejections(rows, "aspect_ratio", [f"{width[r]} x {height[r]}, ratio > {max_ratio:g}" for r in rows])
