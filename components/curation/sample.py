"""Balanced sampling over a hierarchy of clusters (arXiv 2405.15613, section 3.4).

From the top down, each node's quota is divided among its children with the highest possible common cap. A cluster
smaller than its share leaves the rest to its siblings, so that the target is met exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.curation.cluster import Hierarchy


def balanced_sample(hierarchy: Hierarchy, target: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the ascending positions of sampled points, drawn without replacement from each finest cluster.

    Args:
        hierarchy: of N points; one level balances over flat clusters.
        target: number of points; all if there are fewer.
        generator: for the draws.
    """
    counts = [len(centroids) for centroids in hierarchy.centroids]
    members = [_members(labels, count) for labels, count in zip(hierarchy.labels, counts, strict=True)]
    sizes = [np.array([len(rows) for rows in members[0]])]  # points of each cluster, level by level
    for children in members[1:]:
        sizes.append(np.array([sizes[-1][rows].sum() for rows in children]))
    counts = allocate(sizes[-1], target, generator)
    for children, below in zip(members[:0:-1], sizes[-2::-1], strict=True):
        shares = np.zeros_like(below)
        for cluster in np.flatnonzero(counts):
            rows = children[cluster]
            shares[rows] = allocate(below[rows], int(counts[cluster]), generator)
        counts = shares
    drawn = [generator.choice(members[0][c], counts[c], replace=False) for c in np.flatnonzero(counts)]
    return np.sort(np.concatenate(drawn))


def allocate(sizes: NDArray[np.int64], target: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the quota of each cluster: min(cap, size), plus one for random larger clusters up to the target.

    Args:
        sizes: [C].
        target: sum of the result; all points if there are fewer.
        generator: draws the clusters that get one more.
    """
    if sizes.sum() <= target:
        return sizes.copy()
    cap = balanced_cap(sizes, target)
    counts = np.minimum(sizes, cap)
    more = generator.choice(np.flatnonzero(sizes > cap), target - int(counts.sum()), replace=False)
    counts[more] += 1
    return counts


def balanced_cap(sizes: NDArray[np.int64], target: int) -> int:
    """Return the largest cap c for which the sum of min(c, size) is at most `target`, by bisection.

    Args:
        sizes: [C] points of each cluster.
        target: number of points, below the sum of `sizes`.
    """
    low, high = 0, int(sizes.max())
    while high - low > 1:
        middle = (low + high) // 2
        if np.minimum(sizes, middle).sum() <= target:
            low = middle
        else:
            high = middle
    return low


def _members(labels: NDArray[np.int64], num_clusters: int) -> list[NDArray[np.int64]]:
    """Return the rows of each cluster, ascending."""
    ends = np.cumsum(np.bincount(labels, minlength=num_clusters))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])
