"""Nearest neighbours by cosine: FAISS proposes, an exact product decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.core.progress import progress

CHUNK = 4096  # queries searched at once
MARGIN = 1e-4  # FAISS's float32 products are off by less
DECIMALS = 6  # of a similarity: the same on machines that add in another order


@dataclass(frozen=True)
class Neighbors:
    """Pairs above a threshold, and how near each query's nearest neighbour is."""

    query: NDArray[np.int64]  # [E]
    neighbor: NDArray[np.int64]  # [E]
    similarity: NDArray[np.float32]  # [E] cosine, above the threshold
    nearest: NDArray[np.float32]  # [Q] cosine to the nearest other image; -1 where there is none


def find_neighbors(
    queries: NDArray[np.float32], database: NDArray[np.float32] | None, num_neighbors: int, threshold: float
) -> Neighbors:
    """Pairs of a query and one of its `num_neighbors` nearest images whose cosine is above `threshold`.

    Args:
        queries: [Q, D] of unit norm.
        database: [N, D] of unit norm; None searches among the queries themselves, where none is its own neighbour.
        num_neighbors: considered for each query.
        threshold: cosine, exclusive.
    """
    others = queries if database is None else database
    k = min(num_neighbors + (database is None), len(others))
    nearest = np.full(len(queries), -1, np.float32)
    parts: list[tuple[NDArray, NDArray, NDArray]] = []
    if len(queries) and k > 0:
        index = _flat_index(others)
        with progress("neighbours", len(queries)) as advance:
            for start in range(0, len(queries), CHUNK):
                chunk = queries[start : start + CHUNK]
                scores, found = index.search(chunk, k)  # [q, k]
                rows = np.arange(start, start + len(chunk))[:, None]  # [q, 1]
                if database is None:
                    scores = np.where(found == rows, -1, scores)
                nearest[start : start + len(chunk)] = scores.max(axis=1)
                at, column = np.nonzero(scores > threshold - MARGIN)
                parts.append(_decide(queries, others, at + start, found[at, column], threshold))
                advance(len(chunk))
    query, neighbor, similarity = (np.concatenate(c) for c in zip(*parts, strict=True)) if parts else _no_pairs()
    return Neighbors(query, neighbor, similarity, nearest)


def cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each row with the row beside it, summed in float64 and rounded: [E]."""
    return np.einsum("ij,ij->i", left, right, dtype=np.float64).round(DECIMALS).astype(np.float32)


def _flat_index(vectors: NDArray[np.float32]):
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)  # pyright: ignore[reportCallIssue] - faiss replaces the signature at import
    return index


def _decide(
    queries: NDArray[np.float32], others: NDArray[np.float32], query: NDArray, neighbor: NDArray, threshold: float
) -> tuple[NDArray, NDArray, NDArray]:
    similarity = cosine(queries[query], others[neighbor])
    kept = similarity > np.float32(threshold)
    return query[kept].astype(np.int64), neighbor[kept].astype(np.int64), similarity[kept]


def _no_pairs() -> tuple[NDArray, NDArray, NDArray]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
