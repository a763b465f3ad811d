"""Instance retrieval by features: mean average precision of the easy, medium and hard setups.

The setups and the average precision of revisited Oxford and Paris (Radenovic et al. 2018, arXiv:1803.11285, sec. 3.3;
`compute_map` of its released evaluation). DINOv2 (sec. 7.3) names no feature; class tokens are DINOv3's (App. D.8).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.scores import Scores

log = logging.getLogger(__name__)

SCALES = (1.0, 2**-0.5, 0.5)  # of `multi_scale` in DINO's utils.py
# Which of a query's lists are positives; the others of the three are junk.
MODES = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}
_CHUNK = 256  # queries compared at once


@dataclass(frozen=True)
class Query:
    """A query image and what the gallery has of its object; all are rows of the features."""

    row: int
    easy: tuple[int, ...] = ()
    hard: tuple[int, ...] = ()
    junk: tuple[int, ...] = ()

    def positives(self, mode: str) -> NDArray[np.int64]:
        """Return the rows that count as found."""
        return np.array([row for name in MODES[mode] for row in getattr(self, name)], np.int64)

    def ignored(self, mode: str) -> NDArray[np.int64]:
        """Return the rows that are removed from the ranking: other lists, and the query itself."""
        others = [name for name in ("easy", "hard", "junk") if name not in MODES[mode]]
        return np.array([self.row, *(row for name in others for row in getattr(self, name))], np.int64)


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a retrieval set; see `evaluate`."""
    return evaluate(given.tokens.features, _queries(given), given.evalset.gallery)


def run_multi_scale(given: ProtocolInput) -> Scores:
    """Measure a model by the sum of its features over images of several sizes (DINO's evaluation of retrieval)."""
    everything = np.arange(len(given.tokens.features))
    sizes = [given.scaled(scale) for scale in SCALES]
    others = [given.tokens_at(scale, everything).features for scale in SCALES[1:]]
    features = given.tokens.features + np.sum(others, axis=0)  # as their mean, for a cosine
    scores = evaluate(features, _queries(given), given.evalset.gallery, "retrieval_ms")
    scores.notes["retrieval_ms_sizes"] = f"{', '.join(str(size.crop_size) for size in sizes)} pixels"
    return scores


def _queries(given: ProtocolInput) -> list[Query]:
    found = given.evalset.queries
    return [Query(q.index, *(tuple(rows.tolist()) for rows in (q.easy, q.hard, q.junk))) for q in found]


def evaluate(
    features: NDArray[np.floating], queries: Sequence[Query], gallery: NDArray[np.int64], prefix: str = "retrieval"
) -> Scores:
    """Compute the mean average precision by cosine similarity, for each mode.

    A query without positives in a mode is left out of it, as in the released evaluation. `by_image` of a mode has the
    values of `answerable(queries, mode)`, in this order: what is left out depends on the lists alone, so that the
    values of two models are always of the same queries.

    Args:
        features: [N, D] of queries and gallery.
        queries: one or more.
        gallery: rows that are ranked; a query's own row among them is ignored.
        prefix: of the metrics' names.

    Returns:
        `prefix`_map_easy, _medium and _hard; a mode without any query that has positives is left out.

    Raises:
        DatasetError: a query whose lists overlap, name the query itself, or name a row outside the gallery.
    """
    check_queries(queries, gallery)
    orders = _rankings(features, queries, gallery)
    scores = Scores()
    for mode in MODES:
        chosen = answerable(queries, mode)
        if len(chosen) < len(queries):
            without = min(set(range(len(queries))) - set(chosen))
            log.warning(
                "%s, %s: %d of %d queries without positives left out (such as the one of row %d)",
                *(prefix, mode, len(queries) - len(chosen), len(queries), queries[without].row),
            )
        if not chosen:
            continue
        precisions = [_query_precision(orders[number], gallery, queries[number], mode) for number in chosen]
        rows = np.array([queries[number].row for number in chosen])
        scores.add(f"{prefix}_map_{mode}", np.array(precisions), rows)
    return scores


def answerable(queries: Sequence[Query], mode: str) -> list[int]:
    """Return the numbers of the queries that have a positive in this mode."""
    return [number for number, query in enumerate(queries) if len(query.positives(mode))]


def average_precision(ranks: NDArray[np.integer]) -> float:
    """Average precision by the trapezoid rule: each step of recall counts the mean precision of its two ends.

    `compute_ap` of the released evaluation of revisited Oxford and Paris. At rank 0 the precision before is 1.

    Args:
        ranks: [P] of all positives in the ranking without junk, from 0.
    """
    ranks = np.sort(ranks)
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).mean() / 2)


def check_queries(queries: Sequence[Query], gallery: NDArray[np.int64]) -> None:
    """Check the lists of all queries, before features are computed.

    Raises:
        DatasetError: as for `evaluate`.
    """
    if not queries:
        raise DatasetError("retrieval: no queries; give at least one with positives")
    present = set(gallery.tolist())
    for query in queries:
        listed = [*query.easy, *query.hard, *query.junk]
        if len(set(listed)) < len(listed):
            twice = next(row for row in listed if listed.count(row) > 1)
            raise DatasetError(f"retrieval: query of row {query.row} lists row {twice} twice; put it in one list")
        if query.row in (*query.easy, *query.hard):
            raise DatasetError(f"retrieval: query of row {query.row} lists itself as positive; take it off its lists")
        if unknown := sorted(set(listed) - present):
            raise DatasetError(
                f"retrieval: query of row {query.row} lists row {unknown[0]}, which is not in the gallery; "
                "add the image to the gallery or take it off the list"
            )


def _rankings(
    features: NDArray[np.floating], queries: Sequence[Query], gallery: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Return, for each query, the gallery's places by falling similarity; ties leave positives last.

    As in `instance.retrieval_ranks`, so that collapsed features score worst.
    """
    images = _normalized(features[gallery])  # [G, D]
    orders: list[NDArray[np.int64]] = []
    for start in range(0, len(queries), _CHUNK):
        part = queries[start : start + _CHUNK]
        similarities = _normalized(features[[query.row for query in part]]) @ images.T  # [q, G]
        for query, values in zip(part, similarities, strict=True):
            wanted = np.isin(gallery, query.positives("medium"))
            orders.append(np.lexsort((wanted, -values)))
    return orders


def _query_precision(order: NDArray[np.int64], gallery: NDArray[np.int64], query: Query, mode: str) -> float:
    ranked = gallery[order]
    kept = ranked[~np.isin(ranked, query.ignored(mode))]
    return average_precision(np.flatnonzero(np.isin(kept, query.positives(mode))))


def _normalized(features: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(features, np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
