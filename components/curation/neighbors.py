"""Nearest neighbors by cosine: FAISS proposes candidates, which exact products rank.

Below `IndexConfig.flat_below` vectors the search is exhaustive. Above, an inverted file with product quantization
(IVF-PQ, as in DINOv2, arXiv 2304.07193, section 3) proposes candidates, which the original vectors rank; its recall is
measured in every run. Vectors may be memory-mapped: they are read in chunks and never copied whole; `VectorRows`
selects rows without a copy. One thread computes a chunk, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from components.core.progress import progress
from components.curation.config import CurationError, IndexConfig

log = logging.getLogger(__name__)

EXACT_BELOW = IndexConfig()
CHUNK = 512  # queries per search
BLOCK_BYTES = 2**24  # of vectors gathered at a time
EXACT_BLOCK_BYTES = 2**27  # of vectors per block of the exhaustive search
MARGIN = 1e-4  # upper bound of the error of float32 products
DECIMALS = 6  # of similarities: equal on machines with another summation order
MIN_CANDIDATES = 128  # per query; at least twice the requested neighbors
TRAINING_VECTORS = 40  # of each list, drawn with seed 0; FAISS warns below 39
KMEANS_ITERATIONS = 10  # FAISS's own default for an inverted file

Propose = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.int64]]]  # [q, D] -> 2 x [q, c]


@dataclass(frozen=True)
class VectorRows:
    """Lazily read rows of a matrix that is too large to copy."""

    matrix: NDArray[np.float32]  # [A, D]
    rows: NDArray[np.int64]  # [N]

    @property
    def shape(self) -> tuple[int, int]:
        """N, D."""
        return len(self.rows), self.matrix.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.matrix[self.rows[part]]


Vectors = NDArray[np.float32] | VectorRows  # [N, D] of unit norm, in memory or memory-mapped


@dataclass(frozen=True)
class Neighbors:
    """Pairs above a threshold, nearest first for each query, and each query's highest cosine."""

    query: NDArray[np.int64]  # [E] ascending
    neighbor: NDArray[np.int64]  # [E]
    similarity: NDArray[np.float32]  # [E] cosine, above the threshold
    nearest: NDArray[np.float32]  # [Q] cosine to the nearest other image found; -1 if there is none
    recall: float = 1.0  # share of the exact pairs found, for a sample of queries


@dataclass(frozen=True)
class _Task:
    queries: Vectors  # [Q, D]
    others: Vectors  # [N, D]
    among: bool  # search among the queries themselves, excluding each from its neighbors
    num_neighbors: int
    threshold: float | None


def find_neighbors(
    queries: Vectors,
    database: Vectors | None,
    num_neighbors: int,
    threshold: float | None,
    index: IndexConfig = EXACT_BELOW,
) -> Neighbors:
    """Find pairs of a query and one of its `num_neighbors` nearest images with a cosine above `threshold`.

    Args:
        queries: [Q, D].
        database: [N, D]; None searches among the queries, excluding each from its own neighbors.
        num_neighbors: per query.
        threshold: cosine, exclusive; None: return all `num_neighbors` nearest.
        index: search settings.

    Raises:
        CurationError: an IVF-PQ index finds fewer of the exact pairs than `index.min_recall`.
    """
    others = queries if database is None else database
    size = len(others)
    if not len(queries) or size <= (database is None):
        return _join([], len(queries))
    if size < index.flat_below:
        others = others[:]  # read lazy rows once, since they are few
    task, recall = _Task(queries, others, database is None, num_neighbors, threshold), 1.0
    with independent_threads() as threads:
        if size < index.flat_below:
            propose = _exact(task)
        else:
            propose = _approximate(task, index)
            recall = _measure_recall(task, propose, index, threads)
        with progress("neighbors", len(queries)) as advance:
            found = _search(task, propose, np.arange(len(queries)), threads, advance)
    return Neighbors(found.query, found.neighbor, found.similarity, found.nearest, recall)


def cosine(
    left: Vectors, left_rows: NDArray[np.int64], right: Vectors, right_rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the cosine of `left[left_rows]` with `right[right_rows]` by row, summed in float64 and rounded: [E]."""
    result = np.empty(len(left_rows), np.float32)
    step = max(1, BLOCK_BYTES // (4 * left.shape[1]))
    for start in range(0, len(result), step):
        block = slice(start, start + step)
        products = np.einsum("ij,ij->i", left[left_rows[block]], right[right_rows[block]], dtype=np.float64)
        result[block] = products.round(DECIMALS)
    return result


@contextmanager
def independent_threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of as many threads as FAISS would use, each computing single-threaded."""
    import faiss

    threads = ThreadPoolExecutor(faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,))
    try:
        with threadpool_limits(1):
            yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _exact(task: _Task) -> Propose:
    """Return an exhaustive search over the database by blocks."""
    import faiss

    size, dim = task.others.shape
    count = min(task.num_neighbors + task.among, size)
    step = max(1, EXACT_BLOCK_BYTES // (4 * dim))

    def propose(chunk: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, found = np.empty((len(chunk), 0), np.float32), np.empty((len(chunk), 0), np.int64)
        for start in range(0, size, step):
            block = np.ascontiguousarray(task.others[start : start + step])
            new = faiss.knn(chunk, block, min(count, len(block)), faiss.METRIC_INNER_PRODUCT)
            scores, found = np.hstack([scores, new[0]]), np.hstack([found, new[1] + start])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        return scores, found

    return propose


def _approximate(task: _Task, config: IndexConfig) -> Propose:
    """Return a search by an IVF-PQ index with 4-bit codes, with exact products of its candidates."""
    import faiss

    size, dim = task.others.shape
    sample = min(size, config.memory_mib * 2**20 // (4 * dim))
    lists = min(config.num_lists or round(2 * size**0.5), sample)
    parts = min(dim, 2 * config.code_bytes)
    zeros = -dim % parts  # padding, so that all subvectors are equally long; products do not change
    quantizer = faiss.IndexFlatIP(dim + zeros)
    inverted = faiss.IndexIVFPQFastScan(quantizer, dim + zeros, lists, parts, 4, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.niter = KMEANS_ITERATIONS
    inverted.cp.min_points_per_centroid = inverted.pq.cp.min_points_per_centroid = 1
    inverted.nprobe = min(config.num_probes, lists)
    training = _sample(size, min(sample, TRAINING_VECTORS * lists))
    inverted.train(_padded(task.others[training], zeros))  # pyright: ignore[reportCallIssue] - faiss replaces the signature at import
    step = max(1, BLOCK_BYTES // (4 * dim))
    with progress("index", size) as advance:
        for start in range(0, size, step):
            chunk = np.ascontiguousarray(task.others[start : start + step])
            inverted.add(_padded(chunk, zeros))  # pyright: ignore[reportCallIssue]
            advance(len(chunk))
    count = min(max(2 * task.num_neighbors, MIN_CANDIDATES) + task.among, size)

    def propose(chunk: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        found = inverted.search(_padded(chunk, zeros), count)[1]  # pyright: ignore[reportCallIssue]
        return np.where(found < 0, -np.inf, _products(chunk, task.others, found)).astype(np.float32), found

    return propose


def _padded(vectors: NDArray[np.float32], zeros: int) -> NDArray[np.float32]:
    """Append zeros: [n, D] -> [n, D + zeros]."""
    return np.pad(vectors, ((0, 0), (0, zeros))) if zeros else vectors


def _products(chunk: NDArray[np.float32], others: Vectors, found: NDArray[np.int64]) -> NDArray[np.float32]:
    """Compute the product of each query with each of its candidates: [q, D], [N, D], [q, c] -> [q, c]."""
    products = np.empty(found.shape, np.float32)
    step = max(1, BLOCK_BYTES // (4 * found.shape[1] * chunk.shape[1]))
    for start in range(0, len(chunk), step):
        block = slice(start, start + step)
        np.matmul(others[found[block]], chunk[block, :, None], out=products[block, :, None])  # -1 takes the last row
    return products


def _search(
    task: _Task,
    propose: Propose,
    rows: NDArray[np.int64],
    threads: ThreadPoolExecutor,
    advance: Callable[[int], None] | None = None,
) -> Neighbors:
    """Find the pairs of the queries `rows`."""
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    parts = []
    for part in threads.map(lambda chunk: _decide(task, propose, chunk), chunks):
        parts.append(part)
        if advance:
            advance(len(part.nearest))
    return _join(parts, len(rows))


def _decide(task: _Task, propose: Propose, rows: NDArray[np.int64]) -> Neighbors:
    """Find the pairs of one chunk of queries: the nearest candidates by exact cosine."""
    scores, found = propose(np.ascontiguousarray(task.queries[rows]))  # [q, c] each
    if task.among:
        scores[found == rows[:, None]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, : task.num_neighbors]
    scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)  # [q, k]
    lowest = -np.inf if task.threshold is None else task.threshold - MARGIN
    at, column = np.nonzero(scores > lowest)
    neighbor = found[at, column]
    similarity = cosine(task.queries, rows[at], task.others, neighbor)
    order = np.lexsort((neighbor, -similarity, at))
    if task.threshold is not None:
        order = order[similarity[order] > np.float32(task.threshold)]
    return Neighbors(rows[at[order]], neighbor[order], similarity[order], np.maximum(scores[:, 0], -1))


def _measure_recall(task: _Task, propose: Propose, config: IndexConfig, threads: ThreadPoolExecutor) -> float:
    """Measure the share of exact pairs that the index finds, for a sample of queries drawn with seed 0.

    With a threshold any pair counts, because which k of many copies are found does not matter to the graph.

    Raises:
        CurationError: the recall is below `min_recall`.
    """
    rows = _sampled_queries(task, config.recall_sample, threads)
    found, exact = (_search(task, one, rows, threads) for one in (propose, _exact(task)))
    if not len(exact.query):
        log.warning("no pair among %d sampled queries, so the recall of the index is not known", len(rows))
        return 1.0
    hits = len(found.query)
    if task.threshold is None:
        keys = [pairs.query * len(task.others) + pairs.neighbor for pairs in (found, exact)]
        hits = int(np.isin(keys[1], keys[0]).sum())
    recall = hits / len(exact.query)
    what = f"the index finds {recall:.3f} of {len(exact.query)} exact pairs of {len(rows)} sampled queries"
    log.info("%s", what)
    if recall < config.min_recall:
        raise CurationError(
            f"{what}, below curate.index.min_recall {config.min_recall}; raise curate.index.num_probes"
            f" (now {config.num_probes}) or curate.index.code_bytes (now {config.code_bytes})"
        )
    return recall


def _sampled_queries(task: _Task, count: int, threads: ThreadPoolExecutor) -> NDArray[np.int64]:
    """Sample at most `count` queries; in decontamination, where few have a pair, those near sampled references."""
    if task.among or task.threshold is None:
        return _sample(len(task.queries), count)
    swapped = _Task(task.others, task.queries, False, task.num_neighbors, task.threshold)
    near = np.unique(_search(swapped, _exact(swapped), _sample(len(task.others), count), threads).neighbor)
    return near[_sample(len(near), count)]


def _sample(size: int, count: int) -> NDArray[np.int64]:
    """Sample at most `count` of `size` rows, ascending, in memory independent of `size`."""
    if count >= size:
        return np.arange(size)
    return np.unique(np.random.default_rng(0).integers(0, size, count))


def _join(parts: list[Neighbors], num_queries: int) -> Neighbors:
    if not parts:
        none = np.zeros(0, np.int64)
        return Neighbors(none, none, np.zeros(0, np.float32), np.full(num_queries, -1, np.float32))
    return Neighbors(
        np.concatenate([part.query for part in parts]),
        np.concatenate([part.neighbor for part in parts]),
        np.concatenate([part.similarity for part in parts]),
        np.concatenate([part.nearest for part in parts]),
    )
