"""Retrieve pool images similar to seeds, DINOv2's appendix A.4 (arXiv 2304.07193), with counts as in its Table 15.

Unlike there, an image found by several seeds is included once, for its nearest seed, and collisions are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from components.core.progress import track
from components.curation.config import IndexConfig, SeedSetConfig
from components.curation.neighbors import VectorRows, cosine, find_neighbors

BLOCK_BYTES = 2**24  # of vectors or products at a time


@dataclass(frozen=True)
class SeedSet:
    """Query images for retrieval."""

    rows: NDArray[np.int64]  # [S] of the pool
    config: SeedSetConfig


@dataclass(frozen=True)
class CompositionRow:
    """Contribution of one seed set by one mode: a row of Table 15."""

    seed_set: str
    seeds: int
    mode: str  # "as is", "sample k=4", "cluster"
    retrieved: int | None  # found images with repetitions, before the cap; None for "as is"
    collisions: int  # repetitions, and images nearer to a seed of another set
    final: int  # images in the curated set


@dataclass(frozen=True)
class Retrieval:
    """Distinct retrieved images."""

    row: NDArray[np.int64]  # [M] ascending
    query_row: NDArray[np.int64]  # [M] nearest seed that found it
    similarity: NDArray[np.float32]  # [M] cosine to it
    seed_set: list[str]  # [M] of that seed
    composition: list[CompositionRow]
    recall: float = 1.0  # of the index for "sample", see `Neighbors`


@dataclass(frozen=True)
class _Found:
    row: NDArray[np.int64]  # [E]
    query_row: NDArray[np.int64]  # [E]
    similarity: NDArray[np.float32]  # [E]
    retrieved: int  # before any cap
    recall: float = 1.0


def retrieve(
    vectors: NDArray[np.float32],
    candidates: NDArray[np.bool_],
    labels: NDArray[np.int64],
    seed_sets: Mapping[str, SeedSet],
    index: IndexConfig,
    generator: np.random.Generator,
) -> Retrieval:
    """Retrieve images similar to those of each seed set.

    "sample": the k nearest candidates of each seed. "cluster": from each cluster with at least `min_seeds` seeds of the
    set, up to `per_cluster` random candidates, and of all these up to `cap` random ones.

    Args:
        vectors: [N, D] of unit norm, of the whole pool; in memory or memory-mapped.
        candidates: [N] retrievable images; seeds are always excluded.
        labels: [N] finest cluster of each seed and candidate, negative for none; used by "cluster".
        seed_sets: by name.
        index: search settings of "sample".
        generator: for the draws of "cluster".

    Raises:
        CurationError: the index finds too few of the exact neighbors.
    """
    free = candidates.copy()
    for seeds in seed_sets.values():
        free[seeds.rows] = False
    rows = np.flatnonzero(free)
    found = _by_sample(vectors, rows, {n: s for n, s in seed_sets.items() if s.config.retrieve == "sample"}, index)
    for name, seeds in seed_sets.items():
        if seeds.config.retrieve == "cluster":
            found[name] = _by_cluster(vectors, rows, labels, seeds, generator)
    return _each_once(found, seed_sets)


def _by_sample(
    vectors: NDArray[np.float32], rows: NDArray[np.int64], seed_sets: Mapping[str, SeedSet], index: IndexConfig
) -> dict[str, _Found]:
    """Find the k nearest rows of each seed, in one search for all sets."""
    if not seed_sets:
        return {}
    queries = np.concatenate([seeds.rows for seeds in seed_sets.values()])
    most = max(seeds.config.k for seeds in seed_sets.values())
    pairs = find_neighbors(VectorRows(vectors, queries), VectorRows(vectors, rows), most, None, index)
    rank = np.arange(len(pairs.query)) - np.searchsorted(pairs.query, pairs.query)  # nearest first for each query
    found, start = {}, 0
    for name, seeds in seed_sets.items():
        end = start + len(seeds.rows)
        own = np.flatnonzero((pairs.query >= start) & (pairs.query < end) & (rank < seeds.config.k))
        row, query = rows[pairs.neighbor[own]], queries[pairs.query[own]]
        found[name] = _Found(row, query, pairs.similarity[own], len(own), pairs.recall)
        start = end
    return found


def _by_cluster(
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    seeds: SeedSet,
    generator: np.random.Generator,
) -> _Found:
    """Draw random rows from clusters with enough seeds, each with the nearest seed of its cluster."""
    config = seeds.config
    at = labels[seeds.rows]
    clusters, counts = np.unique(at[at >= 0], return_counts=True)
    selected = clusters[counts >= config.min_seeds]
    ordered = rows[np.argsort(labels[rows], kind="stable")]
    firsts, ends = (np.searchsorted(labels[ordered], selected, side=side) for side in ("left", "right"))
    drawn = []
    for first, end in zip(firsts, ends, strict=True):
        drawn.append(generator.choice(ordered[first:end], min(config.per_cluster, end - first), replace=False))
    taken = np.concatenate([np.zeros(0, np.int64), *drawn])
    retrieved = len(taken)
    if retrieved > config.cap:
        taken = generator.choice(taken, config.cap, replace=False)
    taken = taken[np.lexsort((taken, labels[taken]))]
    nearest = [np.zeros(0, np.int64)]
    with threadpool_limits(1):
        parts = np.split(taken, np.flatnonzero(np.diff(labels[taken])) + 1) if len(taken) else []
        for part in track(parts, "nearest seeds", len(parts), "clusters"):
            nearest.append(_nearest(vectors, part, seeds.rows[at == labels[part[0]]]))
    query = np.concatenate(nearest)
    return _Found(taken, query, cosine(vectors, taken, vectors, query), retrieved)


def _nearest(vectors: NDArray[np.float32], rows: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nearest seed of each row: [n]."""
    nearest = np.empty(len(rows), np.int64)
    seed_vectors = vectors[seeds]
    step = max(1, BLOCK_BYTES // (4 * max(seed_vectors.shape)))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        nearest[block] = seeds[(vectors[rows[block]] @ seed_vectors.T).argmax(axis=1)]
    return nearest


def _each_once(found: dict[str, _Found], seed_sets: Mapping[str, SeedSet]) -> Retrieval:
    """Keep each image once, for its nearest seed; ties go to the first set, then to the lowest row."""
    names = [name for name in seed_sets if name in found]
    none = [np.zeros(0, np.int64)]
    row = np.concatenate(none + [found[name].row for name in names])
    query = np.concatenate(none + [found[name].query_row for name in names])
    similarity = np.concatenate([np.zeros(0, np.float32)] + [found[name].similarity for name in names])
    owner = np.repeat(np.arange(len(names)), [len(found[name].row) for name in names])
    order = np.lexsort((query, owner, -similarity, row))
    order = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
    finals = np.bincount(owner[order], minlength=len(names))
    composition = []
    for name, seeds in seed_sets.items():
        if seeds.config.as_is:
            composition.append(CompositionRow(name, len(seeds.rows), "as is", None, 0, len(seeds.rows)))
        if name in found:
            final = int(finals[names.index(name)])
            mode = "cluster" if seeds.config.retrieve == "cluster" else f"sample k={seeds.config.k}"
            collisions = len(found[name].row) - final
            composition.append(CompositionRow(name, len(seeds.rows), mode, found[name].retrieved, collisions, final))
    recall = min((one.recall for one in found.values()), default=1.0)
    owners = [names[o] for o in owner[order]]
    return Retrieval(row[order], query[order], similarity[order], owners, composition, recall)
