"""What a reviewer opens: one HTML file with the numbers, what they mean, and the pictures inside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from components.core.metrics import Interval
from components.core.storage import write_bytes

MEANINGS = {
    "knn_top1": "accuracy of the weighted vote of the nearest train images (cosine of class tokens)",
    "linear_top1": "accuracy of logistic regression on frozen class tokens; C chosen on a part of train",
    "instance_recall_at_1": "share of augmented views whose nearest image is the one they were made from",
    "instance_map": "mean average precision of the same retrieval",
    "effective_rank": "directions that the features use (exp of the entropy of singular values)",
    "feature_std": "spread on the sphere: 1 even, 0 collapsed",
    "linear_c": "the chosen C",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#191c21;max-width:1240px;margin:2rem auto;padding:0 1.5rem}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2rem}p.facts{color:#5f656d;margin-top:.2rem}
table{border-collapse:collapse}td,th{padding:.35rem .9rem;border-bottom:1px solid #e3e6ea;text-align:right}
td:first-child,th:first-child{text-align:left}th{font-weight:600}td.best{font-weight:600}
small{color:#5f656d}img{max-width:100%}.better{color:#1c8c48}.worse{color:#d0342c}
"""


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
    """Write the HTML report; the pictures `pca.jpg` and `neighbours.jpg` beside `path` are put inside it.

    Args:
        path: the HTML file.
        title: what was evaluated.
        facts: one-line statements on the data and the protocol.
        scores: for each model, its metrics; the first model is the candidate.
        differences: for each other model that was compared with intervals, candidate minus it, by metric.
        intervals: for each model, of its accuracies.
    """
    pictures = (
        ("pca", "Patch features", "First three principal components of the patch tokens, as colours, in each row."),
        (
            "neighbours",
            "Nearest neighbours",
            "By cosine of the candidate's class tokens. Frame: green same class, red other.",
        ),
    )
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="facts">{escape(fact)}</p>' for fact in facts)]
    body += ["<h2>Scores</h2>", _score_table(scores, intervals)]
    for other, found in differences.items():
        body += [f"<h2>{escape(next(iter(scores)))} minus {escape(other)}</h2>", _difference_table(found)]
    for name, heading, text in pictures:
        data = base64.b64encode((path.parent / f"{name}.jpg").read_bytes()).decode()
        body += [
            f"<h2>{heading}</h2><p>{escape(text)}</p>",
            f'<img alt="{heading}" src="data:image/jpeg;base64,{data}">',
        ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    write_bytes(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'.encode())


def _score_table(scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]]) -> str:
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    head = "".join(f"<th>{escape(model)}</th>" for model in scores)
    rows = []
    for metric in metrics:
        values = {model: values.get(metric) for model, values in scores.items()}
        best = max(value for value in values.values() if value is not None)
        cells = "".join(_cell(value, best, metric, intervals[model].get(metric)) for model, value in values.items())
        meaning = MEANINGS.get(metric, "")
        rows.append(f"<tr><td>{escape(metric)}<br><small>{escape(meaning)}</small></td>{cells}</tr>")
    note = "<small>In brackets: 95 % interval (Wilson).</small>"
    return f"<table><tr><th>metric</th>{head}</tr>{''.join(rows)}</table>{note}"


def _cell(value: float | None, best: float, metric: str, interval: Interval | None) -> str:
    if value is None:
        return "<td></td>"
    mark = ' class="best"' if value == best and metric != "linear_c" else ""
    bounds = f"<br><small>({interval.low:.3f} to {interval.high:.3f})</small>" if interval else ""
    return f"<td{mark}>{value:.4g}{bounds}</td>"


def _difference_table(intervals: Mapping[str, Interval]) -> str:
    rows = []
    for metric, interval in intervals.items():
        mark = "better" if interval.low > 0 else "worse" if interval.high < 0 else ""
        bounds = f"{interval.low:+.3f} to {interval.high:+.3f}"
        rows.append(f'<tr><td>{escape(metric)}</td><td class="{mark}">{interval.mean:+.3f}</td><td>{bounds}</td></tr>')
    note = (
        "<small>Over images: Bonett and Price for accuracies; for other metrics bootstrap, too narrow near 0 and 1 on "
        "few images. Where images are parts of one photograph, the true width is larger.</small>"
    )
    return f"<table><tr><th>metric</th><th>difference</th><th>95 % interval</th></tr>{''.join(rows)}</table>{note}"
