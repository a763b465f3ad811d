"""Near-duplicates: connected components of the k-nearest-neighbor graph, and the kept image of each.

DINOv2 (arXiv 2304.07193), section 3 and appendix A.3: k = 64 neighbors, edges above 0.6, one image per component.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from components.curation.config import IndexConfig
from components.curation.neighbors import EXACT_BELOW, Neighbors, Vectors, cosine, find_neighbors
from components.curation.rejections import rejections


@dataclass(frozen=True)
class Groups:
    """Groups of duplicates; indices refer to the given images."""

    label: NDArray[np.int64]  # [N] the component of each image
    keeper: NDArray[np.int64]  # [N] the kept image of its component
    nearest: NDArray[np.float32]  # [N] cosine to the nearest other image
    recall: float = 1.0  # of the index that found the pairs, see `Neighbors`


def group_duplicates(
    embeddings: Vectors,
    images: pa.Table,
    num_neighbors: int,
    threshold: float,
    index: IndexConfig = EXACT_BELOW,
    first: NDArray[np.bool_] | None = None,
) -> Groups:
    """Find the components of the graph of pairs above `threshold`, and the keeper of each.

    Args:
        embeddings: [N, D] in the order of `images`.
        images: manifest rows.
        num_neighbors: candidate edges of each image.
        threshold: cosine, exclusive.
        index: search settings.
        first: [N] preferred keepers, such as seeds that are included as they are.

    Raises:
        CurationError: the index misses too many pairs.
    """
    pairs = find_neighbors(embeddings, None, num_neighbors, threshold, index)
    label = components(pairs, len(images))
    return Groups(label, keepers(label, images, first), pairs.nearest, pairs.recall)


def components(pairs: Neighbors, num_images: int) -> NDArray[np.int64]:
    """Return [N] the connected component of each image, with undirected edges."""
    ones = np.ones(len(pairs.query), np.bool_)
    graph = coo_matrix((ones, (pairs.query, pairs.neighbor)), shape=(num_images, num_images))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def keepers(label: NDArray[np.int64], images: pa.Table, first: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Return [N] the keeper of each image's component: one of `first`, then the most pixels, then the lowest id.

    The paper does not say which image is kept; the largest one loses least, and the id makes the rule deterministic.
    """
    pixels = images["width"].to_numpy().astype(np.int64) * images["height"].to_numpy()
    ids = pc.rank(images["image_id"]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    others = np.ones(len(label), np.bool_) if first is None else ~first
    order = np.lexsort((ids, -pixels, others, label))
    _, start, inverse = np.unique(label[order], return_index=True, return_inverse=True)
    keeper = np.empty(len(label), np.int64)
    keeper[order] = order[start][inverse]
    return keeper


def near_duplicates(
    groups: Groups, rows: NDArray[np.int64], embeddings: Vectors, images: pa.Table, threshold: float
) -> pa.Table:
    """Reject all but the keepers as `near_duplicate`, with the keeper and the cosine to it.

    Args:
        groups: of the given images.
        rows: [N] their rows in the pool.
        embeddings: [N, D].
        images: their manifest rows.
        threshold: of `groups`.
    """
    out = np.flatnonzero(groups.keeper != np.arange(len(rows)))
    keeper = groups.keeper[out]
    similarity = cosine(embeddings, out, embeddings, keeper)
    sizes = np.bincount(groups.label)[groups.label[out]]
    detail = [
        f"group of {size}" + ("" if value > threshold else ", linked through other images of it")
        for size, value in zip(sizes, similarity, strict=True)
    ]
    ids = images["image_id"].take(pa.array(keeper)).to_pylist()
    return rejections(rows[out], "near_duplicate", detail, ids, similarity)
