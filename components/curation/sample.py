"""Balanced sampling: the same cap on every cluster, as high as the target allows (arXiv 2405.15613, one level)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def balanced_cap(sizes: NDArray[np.int64], target: int) -> int:
    """The largest cap c for which the sum of min(c, size) is at most `target`, by bisection.

    Args:
        sizes: [C] images of each cluster.
        target: images wanted, below the sum of `sizes`.
    """
    low, high = 0, int(sizes.max())
    while high - low > 1:
        middle = (low + high) // 2
        if np.minimum(sizes, middle).sum() <= target:
            low = middle
        else:
            high = middle
    return low


def allocate(sizes: NDArray[np.int64], target: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How many images to take of each cluster: min(cap, size), and the remainder one each to random larger clusters.

    Args:
        sizes: [C].
        target: the sum of the result, or all images where there are no more.
        generator: draws the clusters that get one more.
    """
    if sizes.sum() <= target:
        return sizes.copy()
    cap = balanced_cap(sizes, target)
    counts = np.minimum(sizes, cap)
    more = generator.choice(np.flatnonzero(sizes > cap), target - int(counts.sum()), replace=False)
    counts[more] += 1
    return counts


def balanced_sample(labels: NDArray[np.int64], target: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the chosen images, ascending: random members of each cluster, without replacement.

    Args:
        labels: [N] the cluster of each image.
        target: images wanted.
        generator: draws clusters and members.
    """
    sizes = np.bincount(labels)
    counts = allocate(sizes, target, generator)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = [generator.choice(rows, n, replace=False) for rows, n in zip(members, counts, strict=True)]
    return np.sort(np.concatenate(drawn))
