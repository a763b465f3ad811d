"""k-means clusters of the pool: one flat level."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits


def cluster(embeddings: NDArray[np.float32], num_clusters: int, iterations: int, seed: int) -> NDArray[np.int64]:
    """Assign each image to a cluster by k-means with k-means++ seeding, L2 distance.

    The number of iterations and the clipping follow facebookresearch/ssl-data-curation (arXiv 2405.15613).

    Args:
        embeddings: [N, D].
        num_clusters: C, clipped to N.
        iterations: Lloyd steps.
        seed: of the k-means++ seeding.

    Returns:
        [N] in [0, C).
    """
    import faiss

    count, dim = embeddings.shape
    kmeans = faiss.Kmeans(
        dim,
        min(num_clusters, count),
        niter=iterations,
        seed=seed,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        max_points_per_centroid=count,  # no subsampling
    )
    data = np.ascontiguousarray(embeddings, np.float32)
    with threadpool_limits(1):  # sums in one order, whatever machine
        kmeans.train(data)
        return kmeans.assign(data)[1].astype(np.int64)
