"""What the last lines of a run say of its models, for results as the evaluation writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.commands.closing import next_steps
from flows.verdict import verdicts


def write(reports: Path, model: str, result: dict) -> None:
    (reports / "evaluate" / model).mkdir(parents=True)
    (reports / "evaluate" / model / "result.json").write_text(json.dumps(result))


def compared(value: float, **others: tuple[float, float, float]) -> dict:
    """A result by kNN: each other's value, and the bounds of the difference."""
    result = {"knn_top1": value, "linear_top1": 0.9, "num_test": 250}
    for name, (other, low, high) in others.items():
        result |= {name: {"knn_top1": other}, f"minus_{name}": {"knn_top1": {"mean": 0, "low": low, "high": high}}}
    return result


def test_a_useless_training_is_called_so_and_not_proposed(tmp_path):
    write(tmp_path, "small", compared(0.7, random=(0.5, 0.1, 0.3)))
    write(tmp_path, "teacher", compared(0.39, random=(0.37, -0.02, 0.06), descriptor=(0.48, -0.16, -0.02)))
    small, teacher = verdicts(tmp_path)
    assert small.text == "kNN of small 0.700, better than random weights (0.500; difference +0.100 to +0.300)"
    assert teacher.text == (
        "kNN of teacher 0.390, no better than random weights (0.370; difference -0.020 to +0.060), "
        "worse than the hand-made descriptor (0.480; difference -0.160 to -0.020)"
    )


def test_each_set_has_a_verdict_and_less_depth_error_is_better(tmp_path):
    result = compared(0.7, random=(0.5, 0.1, 0.3))
    for name, values in compared(0.2, random=(0.3, -0.15, -0.05)).items():
        if isinstance(values, dict):
            result[name] |= {"street/depth_rmse": values["knn_top1"]}
    write(tmp_path, "small", result | {"street/depth_rmse": 0.2, "street/decides": "street/depth_rmse"})
    assert [one.text for one in verdicts(tmp_path)] == [
        "kNN of small 0.700, better than random weights (0.500; difference +0.100 to +0.300)",
        "depth RMSE of small on street 0.200, better than random weights (0.300; difference -0.150 to -0.050)",
    ]


@pytest.mark.parametrize(("failed", "proposed"), [([], True), (["champion"], False)])
def test_what_fails_a_gate_is_not_proposed(failed, proposed):
    steps = next_steps([{"failed_gates": failed}, {"failed_gates": ["random"]}], "flowers")
    assert any('pedigree promote flowers@latest --reason "..."' in step for step in steps) == proposed
    assert any("pedigree review flowers@latest" in step for step in steps)
    assert not any("pedigree promote" in step for step in next_steps([], "flowers"))


def test_sets_without_labels_are_judged_by_retrieval(tmp_path):
    result = {"instance_map": 0.4, "random": {"instance_map": 0.1}}
    write(tmp_path, "teacher", result | {"minus_random": {"instance_map": {"mean": 0.3, "low": 0.2, "high": 0.4}}})
    (found,) = verdicts(tmp_path)
    assert found.text.startswith("retrieval mAP of teacher 0.400, better than random weights (0.100;")
    assert verdicts(tmp_path / "none") == []
