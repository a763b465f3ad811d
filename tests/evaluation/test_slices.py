import numpy as np
import pytest

from components.core.errors import DatasetError
from components.evaluation.config import SlicesConfig
from components.evaluation.protocols.slices import evaluate, group_accuracies

CONFIG = SlicesConfig(min_images=4)


def test_worst_group_and_gap_by_hand(caplog):
    light = ["day"] * 8 + ["night"] * 4 + ["dusk"] * 2 + [None]
    correct = np.array([1] * 7 + [0] + [1, 0, 0, 1] + [0, 0] + [1], float)
    scores = evaluate(correct, {"light": light}, CONFIG)
    summary = {"slices.light.worst": 0.5, "slices.light.worst_images": 4, "slices.light.gap": 0.375}
    assert scores.metrics == {"slices.light=day": 0.875, "slices.light=night": 0.5, **summary}
    assert scores.notes == {"slices.light.worst": "night"}
    assert [(part.name, part.num_images) for part in scores.parts["light"]] == [("day", 8), ("dusk", 2), ("night", 4)]
    assert "1 of 15 test images have no group" in caplog.text
    assert "1 of 3 groups have fewer than 4 images and are neither worst nor best (dusk: 2)" in caplog.text


def test_groups_have_wilson_intervals():
    groups = group_accuracies(np.array([1, 1, 0, 0, 0.0]), ["b", "b", "a", "a", "a"], "kind")
    assert [(group.name, group.num_images, group.score.mean) for group in groups] == [("a", 3, 0), ("b", 2, 1)]
    z = 1.959964
    assert groups[0].score.high == pytest.approx(z**2 / (3 + z**2))
    assert groups[1].score.low == pytest.approx(2 / (2 + z**2))


def test_one_group_has_no_gap(caplog):
    scores = evaluate(np.ones(6), {"light": ["day"] * 5 + ["night"]}, CONFIG)
    assert scores.metrics == {"slices.light=day": 1}
    assert "1 groups of at least 4 images; two are needed" in caplog.text


@pytest.mark.parametrize(
    ("correct", "column", "message"),
    [(np.ones(3), ["a"], "1 groups for 3 test images"), (np.full(1, 0.5), ["a"], "values by image are 0 and 1")],
)
def test_bad_columns(correct, column, message):
    with pytest.raises(DatasetError, match=f"slices.light: .*{message}"):
        evaluate(correct, {"light": column}, CONFIG)
