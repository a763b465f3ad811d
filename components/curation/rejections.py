"""The table of rejected images, to which every step of curation adds rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.curation.config import CurationError

# Every reason there is, in the order in which they are looked for.
MEANING = {
    "exact_duplicate": "the same bytes are listed before",
    "too_small": "the shorter side is below the limit",
    "aspect_ratio": "too long and narrow",
    "format": "not one of the formats that are taken",
    "blocked_source": "its address is on a block list",
    "license": "under a license that is not taken",
    "grayscale": "too little color",
    "blank": "too little in it: one color, or nearly",
    "nsfw": "the classifier holds it unsafe",
    "only_a_query": "of a seed set that only asks for images like its own",
    "evaluation_copy": "looks like an image of an evaluation set, or its group of duplicates has one that does",
    "near_duplicate": "shows the same picture as an image that stays",
    "not_sampled": "a good image of a cluster that has more than its share",
    "not_retrieved": "a good image that no seed set brings in, where there is no balanced part",
}
# The setting of section `curate` that decides, where one does.
SETTING = {
    "too_small": "filters.min_side",
    "aspect_ratio": "filters.max_aspect_ratio",
    "format": "filters.formats",
    "grayscale": "filters.max_gray_share",
    "blank": "filters.min_entropy",
    "nsfw": "filters.max_nsfw",
    "evaluation_copy": "decontamination_similarity",
    "near_duplicate": "dedup_similarity",
    "not_sampled": "target_images",
}
# `row` is a row of the pool; the other columns are those of REJECTED_SCHEMA.
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string()),
        pa.field("similarity", pa.float32()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def rejections(
    rows: NDArray[np.int64],
    reason: str | Sequence[str],
    detail: str | Sequence[str],
    duplicate_of: Sequence[str] | None = None,
    similarity: NDArray[np.float32] | None = None,
) -> pa.Table:
    """Return a table of SCHEMA; `reason` and `detail` may be one text for all rows."""
    assert ({reason} if isinstance(reason, str) else set(reason)) <= MEANING.keys(), "a reason without a meaning"
    count = len(rows)
    columns = [
        pa.array(rows, pa.int64()),
        pa.array([reason] * count if isinstance(reason, str) else reason, pa.string()),
        pa.nulls(count, pa.string()) if duplicate_of is None else pa.array(duplicate_of, pa.string()),
        pa.nulls(count, pa.float32()) if similarity is None else pa.array(similarity, pa.float32()),
        pa.array([detail] * count if isinstance(detail, str) else detail, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def remaining(rows: NDArray[np.int64], rejected: pa.Table, advice: str) -> NDArray[np.int64]:
    """Return the rows that are not rejected.

    Raises:
        CurationError: none is left; the message counts the reasons and ends with `advice`.
    """
    left = rows[~np.isin(rows, rejected["row"].to_numpy())]
    if len(rows) and not len(left):
        counts = ", ".join(f"{reason} {count}" for reason, count in value_counts(rejected["reason"]).items())
        raise CurationError(f"no image is left of {len(rows)}: {counts}; {advice}")
    return left


def value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the rows of each value of a column, sorted by value."""
    counts = column.combine_chunks().value_counts().to_pylist()
    return dict(sorted((item["values"], item["counts"]) for item in counts))
