"""Tables of an evaluation on all sets: every score, and the scores of each test image."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.core.metric_names import in_set
from components.core.storage import write_bytes
from components.evaluation.comparison_report import deciding_metric
from components.evaluation.measure import MeasuredSet


def write_comparison(path: Path, sets: Sequence[MeasuredSet]) -> None:
    """Write `set,model,metric,value` rows of all metrics."""
    rows = [
        (one.evalset.name, model, metric, value)
        for one in sets
        for model, scores in one.found.scores.items()
        for metric, value in scores.metrics.items()
    ]
    _write_csv(path, ("set", "model", "metric", "value"), rows)


def write_deciding(path: Path, sets: Sequence[MeasuredSet]) -> None:
    """Write `score,value` rows of the metric that decides on each set, which DVC plots: a bar for each model."""
    rows = []
    for one in sets:
        metric = deciding_metric(one.found)
        rows += [
            (f"{one.evalset.name} {metric}: {model}", scores.metrics[metric])
            for model, scores in one.found.scores.items()
            if metric in scores.metrics
        ]
    _write_csv(path, ("score", "value"), rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    write_bytes(path, text.getvalue().encode())


def write_by_image(path: Path, sets: Sequence[MeasuredSet]) -> None:
    """Write a row for each set, model, metric and test image, for paired comparisons of models of different runs.

    `metric` is the whole name, with that of a set that is not the main one; `cluster` is the photograph that an image
    is a part of, null where the set does not say so.
    """
    parts = [
        _rows(one, model, metric)
        for one in sets
        for model, scores in one.found.scores.items()
        for metric in scores.by_image
    ]
    pq.write_table(pa.concat_tables(parts).combine_chunks(), path, compression="zstd")


def _rows(one: MeasuredSet, model: str, metric: str) -> pa.Table:
    scores, evalset = one.found.scores[model], one.evalset
    values, clusters = scores.by_image[metric], None if metric in scores.rows else evalset.clusters
    rows, count = scores.rows.get(metric, evalset.test), len(values)
    return pa.table(
        {
            "set": [evalset.name] * count,
            "image_id": evalset.images.images["image_id"].take(pa.array(rows)),
            "cluster": pa.array([None] * count if clusters is None else clusters.tolist(), pa.string()),
            "model": [model] * count,
            "metric": [in_set(metric, one.prefix)] * count,
            "value": pa.array(values, pa.float64()),
        }
    )
