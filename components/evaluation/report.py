"""Rows of the tables on a page: metrics with their meanings, intervals, and marks of what is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.core.metric_names import lower_is_better
from components.core.metrics import Interval
from components.core.page import Cell

MEANINGS = {
    "knn_top1": "accuracy of the weighted vote of the nearest train images (cosine of features)",
    "linear_top1": "accuracy of logistic regression on frozen features; C chosen on a part of train",
    "instance_recall_at_1": "share of augmented views whose nearest image is the one they were made from",
    "instance_map": "mean average precision of the same retrieval",
    "effective_rank": "directions that the features use (exp of the entropy of singular values)",
    "feature_std": "spread on the sphere: 1 even, 0 collapsed",
    "linear_c": "the chosen C",
}
NO_SCORES = ("linear_c", ".worst_images")  # ends of names of metrics of which no value is best


def key_figures(scores: Mapping[str, Mapping[str, float]], chosen: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the first model's main metrics, at most four, each with the value of the next model."""
    (_, candidate), *others = scores.items()
    found = []
    for metric in [metric for metric in dict.fromkeys(chosen) if metric in candidate][:4]:
        beside = [f"{name} {values[metric]:.4g}" for name, values in others[:1] if metric in values]
        found.append((metric, f"{candidate[metric]:.4g}", "".join(beside)))
    return found


def score_rows(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]]
) -> list[list[Cell]]:
    """Return a row for each metric, a column for each model; the best value is marked."""
    rows = []
    for metric in dict.fromkeys(metric for values in scores.values() for metric in values):
        row = {model: values.get(metric) for model, values in scores.items()}
        best = (min if lower_is_better(metric) else max)(value for value in row.values() if value is not None)
        cells = [_cell(value, best, metric, intervals[model].get(metric)) for model, value in row.items()]
        rows.append([Cell(metric, MEANINGS.get(metric, "")), *cells])
    return rows


def _cell(value: float | None, best: float, metric: str, interval: Interval | None) -> Cell:
    if value is None:
        return Cell("")
    bounds = f"({interval.low:.3f} to {interval.high:.3f})" if interval else ""
    return Cell(f"{value:.4g}", bounds, "best" if value == best and not metric.endswith(NO_SCORES) else "")


def difference_rows(intervals: Mapping[str, Interval]) -> list[tuple[str, Cell, str]]:
    """Return a row for each metric: the difference, marked where its interval excludes none, and the interval."""
    rows = []
    for metric, interval in intervals.items():
        signs = ("bad", "good") if lower_is_better(metric) else ("good", "bad")
        mark = signs[0] if interval.low > 0 else signs[1] if interval.high < 0 else ""
        rows.append((metric, Cell(f"{interval.mean:+.3f}", mark=mark), f"{interval.low:+.3f} to {interval.high:+.3f}"))
    return rows
