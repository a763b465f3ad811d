"""Hierarchical k-means with resampling, on CPU (arXiv 2405.15613, sections 3 and 4, written from the description).

The centroids of k-means follow the density of the points, so a large concept gets many of them. Two remedies:
resampling repeats k-means on the points nearest to each centroid, whose density is flatter, and each further level
clusters the centroids of the one below. Vectors may be memory-mapped: they are read in chunks and never copied whole.
Each chunk is computed by one thread and chunks are summed in order, so the result does not depend on the number of
threads.

Departures from the paper to limit the cost, for levels with more points than these bounds: k-means++ uses
SEEDING_POINTS per cluster and at most SEEDING_BYTES, Lloyd's iterations TRAINING_POINTS per cluster, drawn at random.
All points are assigned in the end. Lloyd's iterations stop when one lowers the mean squared distance by less than
TOLERANCE, relatively.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.core.progress import progress
from components.curation.config import LevelConfig
from components.curation.neighbors import independent_threads

SEEDING_POINTS = 32
SEEDING_BYTES = 2**28  # but at least two points per cluster
SEEDING_PART_BYTES = 2**23  # per thread: enough work to amortize the overhead
TRAINING_POINTS = 256  # FAISS's own default
TOLERANCE = 1e-4
CHUNK_BYTES = 2**21  # of vectors that one thread reads at a time


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of clusters; level 1 is the finest."""

    labels: list[NDArray[np.int64]]  # level 1: [N] cluster of each point; level t: [C_(t-1)] of each lower cluster
    centroids: list[NDArray[np.float32]]  # level t: [C_t, D]

    def paths(self) -> list[str]:
        """Return [N] the clusters of each point from the top down, such as "3/17/204"."""
        names = [str(cluster) for cluster in range(len(self.centroids[-1]))]
        for parents in reversed(self.labels[1:]):
            names = [f"{names[parent]}/{cluster}" for cluster, parent in enumerate(parents.tolist())]
        return [names[cluster] for cluster in self.labels[0].tolist()]


def hierarchical_kmeans(
    vectors: NDArray[np.float32],
    levels: Sequence[LevelConfig],
    iterations: int,
    seed: int,
    rows: NDArray[np.int64] | None = None,
) -> Hierarchy:
    """Cluster the vectors, then the centroids, level by level.

    Args:
        vectors: [A, D] float32, in memory or memory-mapped.
        levels: from the finest to the coarsest; one level is flat k-means. At most one cluster per point.
        iterations: Lloyd's, of each k-means.
        seed: of every draw.
        rows: [N] of `vectors`, the points to cluster; None: all.
    """
    points, labels, centroids = vectors, [], []
    rows = np.arange(len(vectors)) if rows is None else rows
    with independent_threads() as threads:
        for number, level in enumerate(levels, 1):
            with progress(
                f"k-means level {number}", (1 + level.resampling_steps) * iterations, "iterations"
            ) as advance:
                generator = np.random.default_rng([seed, number])
                kmeans = _KMeans(points, iterations, generator, threads, advance)
                found, where = kmeans.solve_with_resampling(rows, level)
            labels.append(where)
            centroids.append(found)
            points, rows = found, np.arange(len(found))
    return Hierarchy(labels, centroids)


@dataclass(frozen=True)
class _Assignment:
    label: NDArray[np.int64]  # [n] the nearest centroid of each point
    distance: NDArray[np.float32]  # [n] squared distance to it


@dataclass(frozen=True)
class _KMeans:
    """k-means over rows of one matrix, by L2 distance."""

    points: NDArray[np.float32]  # [A, D]
    iterations: int
    generator: np.random.Generator
    threads: ThreadPoolExecutor
    advance: Callable[[int], None]

    def solve_with_resampling(
        self, rows: NDArray[np.int64], level: LevelConfig
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the centroids [C, D] and the label of each row [n] of one level (section 3.3)."""
        centroids = self.solve(rows, level.num_clusters)
        assigned = self.assign(rows, centroids)
        sample_size = level.sample_size or len(rows) // (2 * len(centroids))
        for _ in range(level.resampling_steps):
            if sample_size > 1:  # one point per cluster would only move each centroid onto a point
                centroids = self.solve(rows[_nearest(assigned, sample_size)], level.num_clusters)
                assigned = self.assign(rows, centroids)
            else:
                self.advance(self.iterations)
        return centroids, assigned.label

    def solve(self, rows: NDArray[np.int64], num_clusters: int) -> NDArray[np.float32]:
        """Return centroids [C, D] by k-means++ and Lloyd's iterations, C at most the number of rows."""
        count = min(num_clusters, len(rows))
        training = self._draw(rows, TRAINING_POINTS * count)
        seeding = min(SEEDING_POINTS * count, max(2 * count, SEEDING_BYTES // (4 * self.points.shape[1])))
        centroids = self._plus_plus(self._read(self._draw(training, seeding)), count)
        previous = np.inf
        for done in range(self.iterations):
            sums, sizes, distance = self._sums(training, centroids)
            filled = sizes > 0  # an empty cluster keeps its old centroid
            centroids[filled] = sums[filled] / sizes[filled, None]
            if distance >= (1 - TOLERANCE) * previous:
                self.advance(self.iterations - done)
                break
            previous = distance
            self.advance(1)
        return centroids

    def assign(self, rows: NDArray[np.int64], centroids: NDArray[np.float32]) -> _Assignment:
        """Assign each row to its nearest centroid."""
        import faiss

        label, distance = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)

        def fill(block: slice) -> None:
            near = faiss.knn(self._read(rows[block]), centroids, 1, faiss.METRIC_L2)
            distance[block], label[block] = near[0][:, 0], near[1][:, 0]

        for _ in self.threads.map(fill, self._blocks(len(rows), CHUNK_BYTES)):
            pass
        return _Assignment(label, distance)

    def _plus_plus(self, points: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """Run k-means++ with the best of 2 + ln(C) candidates per centroid (Arthur and Vassilvitskii 2007, section 5).

        Args:
            points: [n, D] to choose from.
            count: C.
        """
        norms = np.einsum("ij,ij->i", points, points)
        parts = self._blocks(len(points), SEEDING_PART_BYTES)
        each = self.threads.map if len(parts) > 1 else map
        nearest = np.full(len(points), np.inf, np.float32)  # squared distance of each point to the chosen ones

        def nearer(drawn: NDArray[np.int64]) -> NDArray[np.float32]:  # [c, n] `nearest` after adding each
            def one(part: slice) -> NDArray[np.float32]:
                distances = norms[part] + norms[drawn, None] - 2 * (points[drawn] @ points[part].T)
                return np.minimum(np.maximum(distances, 0), nearest[part])

            distances = np.concatenate(list(each(one, parts)), axis=1)
            distances[np.arange(len(drawn)), drawn] = 0
            return distances

        chosen = [int(self.generator.integers(len(points)))]
        nearest = nearer(np.array(chosen))[0]
        while len(chosen) < count:
            total = np.cumsum(nearest, dtype=np.float64)
            if total[-1] > 0:
                trials = self.generator.random(2 + int(np.log(count))) * total[-1]
                drawn = np.searchsorted(total, trials, side="right")
            else:  # all points coincide with chosen ones
                drawn = self.generator.integers(len(points), size=1)
            candidates = nearer(drawn)
            best = int(candidates.sum(axis=1, dtype=np.float64).argmin())
            chosen.append(int(drawn[best]))
            nearest = candidates[best]
        return points[chosen]

    def _sums(
        self, rows: NDArray[np.int64], centroids: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
        """Return sums [C, D] and sizes [C] of the points nearest to each centroid, and the total squared distance."""
        import faiss

        def part(block: slice) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], float]:
            chunk = self._read(rows[block])
            near = faiss.knn(chunk, centroids, 1, faiss.METRIC_L2)
            order = np.argsort(near[1][:, 0], kind="stable")
            filled, first, sizes = np.unique(near[1][order], return_index=True, return_counts=True)
            sums = np.add.reduceat(chunk[order].astype(np.float64), first, axis=0)
            return filled, sums, sizes, float(near[0].sum(dtype=np.float64))

        total, count, error = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), 0.0
        for filled, sums, sizes, distance in self.threads.map(part, self._blocks(len(rows), CHUNK_BYTES)):
            total[filled] += sums
            count[filled] += sizes
            error += distance
        return total, count, error

    def _draw(self, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return at most `count` random rows, ascending."""
        if count >= len(rows):
            return rows
        return rows[np.sort(self.generator.choice(len(rows), count, replace=False))]

    def _blocks(self, count: int, num_bytes: int) -> list[slice]:
        step = max(1, num_bytes // (4 * self.points.shape[1]))
        return [slice(start, start + step) for start in range(0, count, step)]

    def _read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.points[rows], np.float32)


def _nearest(assigned: _Assignment, sample_size: int) -> NDArray[np.int64]:
    """Return the positions of the `sample_size` points nearest to each centroid, ascending; ties by position."""
    order = np.lexsort((assigned.distance, assigned.label))
    sizes = np.bincount(assigned.label)
    firsts = np.cumsum(sizes) - sizes
    parts = [order[first : first + min(size, sample_size)] for first, size in zip(firsts, sizes, strict=True)]
    return np.sort(np.concatenate(parts))
