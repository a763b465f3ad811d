"""Compare a run's models with the champion, random weights and the training-free descriptor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURES = (("knn_top1", "kNN"), ("instance_map", "retrieval mAP"))  # the first available one decides
OTHERS = {"champion": "the champion", "random": "random weights", "descriptor": "the hand-made descriptor"}


@dataclass(frozen=True)
class Verdict:
    """Comparison of one evaluated model.

    Args:
        model: its name among the evaluations.
        text: its main metric, and the others' with the 95 % interval of the difference on the same images.
    """

    model: str
    text: str


def verdicts(reports: Path) -> list[Verdict]:
    """Read the evaluations in a run's reports."""
    found = [
        (path.parent.name, json.loads(path.read_text())) for path in sorted(reports.glob("evaluate/*/result.json"))
    ]
    return [_verdict(model, result) for model, result in found]


def _verdict(model: str, result: dict[str, Any]) -> Verdict:
    key, label = next((key, label) for key, label in MEASURES if key in result)
    comparisons = []
    for other, name in OTHERS.items():
        if key not in result.get(f"minus_{other}", {}):
            continue
        interval = result[f"minus_{other}"][key]
        word = "better" if interval["low"] > 0 else "worse" if interval["high"] < 0 else "no better"
        low, high = (f"{interval[end]:+.3f}" for end in ("low", "high"))
        comparisons.append(f"{word} than {name} ({result[other][key]:.3f}; difference {low} to {high})")
    return Verdict(model, f"{label} of {model} {result[key]:.3f}, {', '.join(comparisons)}")
