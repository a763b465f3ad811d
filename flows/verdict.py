"""Compare a run's models with the champion, random weights and the training-free descriptor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.metric_names import compared, deciding, lower_is_better, sets_in, split_name

LABELS = {
    "knn_top1": "kNN",
    "instance_map": "retrieval mAP",
    "retrieval_map_medium": "retrieval mAP",
    "segmentation_image_miou": "mIoU",
    "depth_rmse": "depth RMSE",
}  # of metrics that decide; others are called as they are
OTHERS = {"champion": "the champion", "random": "random weights", "descriptor": "the hand-made descriptor"}


@dataclass(frozen=True)
class Verdict:
    """Comparison of one evaluated model on one set.

    Args:
        model: its name among the evaluations.
        text: the metric that decides, and the others' with the 95 % interval of the difference on the same images.
    """

    model: str
    text: str


def verdicts(reports: Path) -> list[Verdict]:
    """Read the evaluations in a run's reports."""
    found = [
        (path.parent.name, json.loads(path.read_text())) for path in sorted(reports.glob("evaluate/*/result.json"))
    ]
    return [
        _verdict(model, evalset, deciding(result, evalset), result)
        for model, result in found
        for evalset in sets_in(result)
    ]


def _verdict(model: str, evalset: str | None, key: str, result: dict[str, Any]) -> Verdict:
    comparisons = []
    for other in compared(result):
        if key not in result[f"minus_{other}"]:
            continue
        name = OTHERS.get(other, f"its parent {other}")
        low, high = (result[f"minus_{other}"][key][end] for end in ("low", "high"))
        sign = ((low > 0) - (high < 0)) * (-1 if lower_is_better(key) else 1)
        word = {1: "better", -1: "worse", 0: "no better"}[sign]
        comparisons.append(f"{word} than {name} ({result[other][key]:.3f}; difference {low:+.3f} to {high:+.3f})")
    metric, on = split_name(key)[1], "" if evalset is None else f" on {evalset}"
    return Verdict(model, ", ".join([f"{LABELS.get(metric, metric)} of {model}{on} {result[key]:.3f}", *comparisons]))
