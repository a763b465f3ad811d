"""Report for reviewers: one HTML file with metrics, their meanings and embedded pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.core.metrics import Interval
from components.core.page import Cell, Picture, render
from components.core.storage import write_bytes
from components.evaluation.scores import lower_is_better

MEANINGS = {
    "knn_top1": "accuracy of the weighted vote of the nearest train images (cosine of class tokens)",
    "linear_top1": "accuracy of logistic regression on frozen class tokens; C chosen on a part of train",
    "instance_recall_at_1": "share of augmented views whose nearest image is the one they were made from",
    "instance_map": "mean average precision of the same retrieval",
    "effective_rank": "directions that the features use (exp of the entropy of singular values)",
    "feature_std": "spread on the sphere: 1 even, 0 collapsed",
    "linear_c": "the chosen C",
}
NO_SCORES = ("linear_c", ".worst_images")  # ends of names of metrics of which no value is best
KEY = ("knn_top1", "linear_top1", "instance_recall_at_1", "effective_rank")  # shown first


def write_comparison(path: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Write `model,metric,value` rows, which DVC plots."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "metric", "value"))
    writer.writerows((model, metric, value) for model, values in scores.items() for metric, value in values.items())
    write_bytes(path, text.getvalue().encode())


def write_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Mapping[str, Interval]],
    intervals: Mapping[str, Mapping[str, Interval]],
) -> None:
    """Write the HTML report with the embedded pictures `pca.jpg` and `neighbors.jpg` beside `path`.

    Args:
        path: the HTML file.
        title: what was evaluated.
        facts: one-line statements on the data and the protocol.
        scores: metrics by model; the first model is the candidate.
        differences: intervals of candidate minus another model, by model and metric.
        intervals: of the accuracies, by model and metric.
    """
    models = list(scores)
    page = render(
        "components/evaluation/report.html",
        title=title,
        facts=facts,
        models=models,
        key=key_figures(scores, KEY),
        scores=score_rows(scores, intervals),
        differences={other: difference_rows(found) for other, found in differences.items()},
        pca=Picture((path.parent / "pca.jpg").read_bytes(), "Patch features", "jpeg"),
        neighbors=Picture((path.parent / "neighbors.jpg").read_bytes(), "Nearest neighbors", "jpeg"),
    )
    write_bytes(path, page)


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
