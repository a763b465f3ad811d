import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from components.training.config import OptimizerConfig, TeacherConfig, TrainingConfig
from components.training.schedules import CosineSchedule, Schedules

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("lr_base1e-3_final1e-6_total50_warmup10", CosineSchedule(1e-3, 1e-6, 50, warmup_steps=10)),
        ("lr_freeze5", CosineSchedule(1e-3, 1e-6, 50, warmup_steps=10, frozen_steps=5)),
        ("momentum_0.994_1_total50", CosineSchedule(0.994, 1.0, 50)),
    ],
)
def test_equals_released_code(name, schedule):
    np.testing.assert_allclose([schedule(step) for step in range(50)], REFERENCE[f"schedule/{name}"], rtol=1e-12)


def test_stays_at_end():
    assert CosineSchedule(1.0, 0.25, 10)(10) == 0.25
    assert CosineSchedule(1.0, 0.25, 10)(1_000) == 0.25


def test_a_backbone_under_new_heads_stands_still_and_then_has_a_warm_up_of_its_own():
    optimizer = OptimizerConfig(warmup_steps=4, freeze_last_layer_steps=0, freeze_backbone_steps=6)
    schedules = Schedules(TrainingConfig(steps=20, optimizer=optimizer, teacher=TeacherConfig(temp_warmup_steps=0)))
    factors = [schedules.at(step).backbone_lr_factor for step in range(12)]
    assert factors == [0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_paper_values():
    """arXiv:2304.07193, Table 16: learning rate 3.5e-4 at batch 3072, reached after 100,000 steps."""
    schedules = Schedules(TrainingConfig())
    peak = schedules.at(100_000)
    assert peak.lr == pytest.approx(2e-4 * math.sqrt(3), rel=1e-9)
    assert peak.teacher_temp == 0.07
    start = schedules.at(0)
    assert (start.lr, start.last_layer_lr, start.weight_decay, start.ema_momentum, start.teacher_temp) == (
        0.0, 0.0, pytest.approx(0.04), pytest.approx(0.994), 0.04,
    )  # fmt: skip
    assert schedules.at(37_499 // 2).teacher_temp == pytest.approx(0.055, abs=1e-5)
    assert schedules.at(1_249).last_layer_lr == 0.0
    assert schedules.at(1_250).last_layer_lr == schedules.at(1_250).lr > 0
    end = schedules.at(625_000)
    assert (end.lr, end.weight_decay, end.ema_momentum) == (1e-6, 0.2, 1.0)
