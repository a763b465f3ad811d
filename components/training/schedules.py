"""Schedules as functions of the step (dinov2/utils/utils.py, CosineScheduler)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from components.training.config import TrainingConfig

REFERENCE_BATCH_SIZE = 1024  # of base learning rates (dinov2/utils/config.py)


@dataclass(frozen=True)
class CosineSchedule:
    """Zero while frozen, then linear from `warmup_start` to `start`, then half a cosine to `end`."""

    start: float
    end: float
    steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0
    frozen_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the value at `step`, counted from 0; `end` from `steps` on."""
        if step < self.frozen_steps:
            return 0.0
        if step >= self.steps:
            return self.end
        warm = step - self.frozen_steps
        if warm < self.warmup_steps:
            # The last warm-up step has the full value, as in np.linspace(warmup_start, start, warmup_steps).
            return self.warmup_start + (self.start - self.warmup_start) * warm / max(self.warmup_steps - 1, 1)
        cosine_steps = self.steps - self.frozen_steps - self.warmup_steps
        phase = math.pi * (warm - self.warmup_steps) / cosine_steps
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(phase))


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temp: float
    backbone_lr_factor: float = 1.0  # of lr, for the backbone


class Schedules:
    """All schedules of one training run (arXiv:2304.07193, app. B; dinov2/train/train.py)."""

    def __init__(self, config: TrainingConfig) -> None:
        optimizer, teacher, ema = config.optimizer, config.teacher, config.ema
        scale = math.sqrt(config.batch_size / REFERENCE_BATCH_SIZE)
        self._frozen_last_layer_steps = optimizer.freeze_last_layer_steps
        self._frozen_backbone_steps, self._warmup_steps = optimizer.freeze_backbone_steps, optimizer.warmup_steps
        self._lr = CosineSchedule(
            optimizer.base_lr * scale, optimizer.min_lr, config.steps, warmup_steps=optimizer.warmup_steps
        )
        self._weight_decay = CosineSchedule(optimizer.weight_decay_start, optimizer.weight_decay_end, config.steps)
        self._ema_momentum = CosineSchedule(ema.momentum_start, ema.momentum_end, config.steps)
        self._teacher_temp = CosineSchedule(
            teacher.temp_end,
            teacher.temp_end,
            config.steps,
            warmup_steps=teacher.temp_warmup_steps,
            warmup_start=teacher.temp_start,
        )

    def at(self, step: int) -> StepValues:
        """Return the values for `step`, counted from 0."""
        lr = self._lr(step)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self._frozen_last_layer_steps else lr,
            weight_decay=self._weight_decay(step),
            ema_momentum=self._ema_momentum(step),
            teacher_temp=self._teacher_temp(step),
            backbone_lr_factor=self._backbone_lr_factor(step),
        )

    def _backbone_lr_factor(self, step: int) -> float:
        """Return 0 while the backbone is frozen, then rise linearly to 1 over a warm-up of its own."""
        if not self._frozen_backbone_steps:
            return 1.0
        moving = step + 1 - self._frozen_backbone_steps
        return min(max(moving / max(self._warmup_steps, 1), 0.0), 1.0)
