"""Remove copies of evaluation images from the pool, by whole connected components.

DINOv2 (arXiv 2304.07193), appendix A.3: the duplicate graph with the train and test images of the evaluation sets as
references and the lower threshold 0.45; components that contain a reference are discarded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.curation.config import IndexConfig
from components.curation.deduplicate import Groups
from components.curation.neighbors import EXACT_BELOW, Vectors, find_neighbors
from components.curation.rejections import rejections


@dataclass(frozen=True)
class References:
    """The images of all evaluation sets."""

    images: pa.Table  # manifest rows; `source` names the evaluation set
    embeddings: NDArray[np.float32]  # [R, D] of unit norm


@dataclass(frozen=True)
class Contamination:
    """Copies of evaluation images in the pool."""

    rejected: pa.Table
    per_set: dict[str, int]  # pool images in components that match each evaluation set
    nearest: NDArray[np.float32]  # [N] cosine to the nearest evaluation image; -1 if there is none
    recall: dict[str, float]  # of the index of each set, see `Neighbors`


def find_contamination(
    groups: Groups,
    rows: NDArray[np.int64],
    embeddings: Vectors,
    references: References,
    threshold: float,
    index: IndexConfig = EXACT_BELOW,
) -> Contamination:
    """Reject all images of components in which an image exceeds `threshold` to an evaluation image.

    The components are those of the duplicate graph, because edges at 0.45 would connect large parts of the pool.

    Args:
        groups: duplicates among the given images.
        rows: [N] their rows in the pool.
        embeddings: [N, D].
        references: the evaluation images.
        threshold: cosine, exclusive.
        index: settings of the search in each evaluation set.

    Raises:
        CurationError: the index of a set misses too many pairs.
    """
    count = len(rows)
    best = np.full(count, -1, np.float32)  # to the nearest reference of any set
    nearest = best.copy()
    reference = np.zeros(count, np.int64)
    per_set: dict[str, int] = {}
    recall: dict[str, float] = {}
    sources = references.images["source"].to_numpy()
    for name in sorted(set(sources)):
        members = np.flatnonzero(sources == name)
        pairs = find_neighbors(embeddings, _take(references.embeddings, members), 1, threshold, index)
        recall[name] = pairs.recall
        nearest = np.maximum(nearest, pairs.nearest)
        per_set[name] = int(np.isin(groups.label, groups.label[pairs.query]).sum())
        nearer = pairs.similarity > best[pairs.query]
        best[pairs.query[nearer]] = pairs.similarity[nearer]
        reference[pairs.query[nearer]] = members[pairs.neighbor[nearer]]
    return Contamination(_reject(groups, rows, references.images, reference, best), per_set, nearest, recall)


def _take(embeddings: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows of one evaluation set, without a copy if they are contiguous, as for one source."""
    first, end = int(rows[0]), int(rows[-1]) + 1
    return embeddings[first:end] if end - first == len(rows) else embeddings[rows]


def _reject(
    groups: Groups, rows: NDArray[np.int64], references: pa.Table, reference: NDArray[np.int64], best: NDArray
) -> pa.Table:
    """Reject as `evaluation_copy` the images that match a reference, and all others of their components."""
    order = np.lexsort((-best, groups.label))  # the best match of each component first
    labels, first = np.unique(groups.label[order], return_index=True)
    touching = order[first][np.searchsorted(labels, groups.label)]  # [N] that image, for each image
    out = np.flatnonzero(best[touching] > -1)
    via = np.where(best[out] > -1, out, touching[out])
    ids, sets = references["image_id"].to_pylist(), references["source"].to_pylist()
    detail = [
        f"evaluation set {sets[reference[v]]}" + ("" if v == row else ", through an image of its group")
        for row, v in zip(out, via, strict=True)
    ]
    duplicates = [ids[reference[v]] for v in via]
    return rejections(rows[out], "evaluation_copy", detail, duplicates, best[via])
