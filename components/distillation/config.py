"""Distillation of the adapted model into smaller ones (arXiv:2304.07193, sec. 5 and Table 16)."""

from __future__ import annotations

import math
import re
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from components.core.config import Config
from components.core.layout import RELATIVE
from components.model.config import ViTConfig
from components.training.config import OptimizerConfig, TrainingConfig, check_crops_fit


class StudentConfig(Config):
    """Settings of one student. Its heads have the teacher's shapes, because they share prototypes."""

    backbone: ViTConfig = ViTConfig()  # L/14, MLP, no stochastic depth: Table 16

    @model_validator(mode="after")
    def _no_drop_path(self) -> Self:
        if self.backbone.drop_path:
            raise ValueError(f"backbone.drop_path is {self.backbone.drop_path}; distillation trains whole depth: use 0")
        return self


class DistillOptimizerConfig(OptimizerConfig):
    """AdamW for students."""

    base_lr: PositiveFloat = 1e-3 / math.sqrt(2)  # Table 16: 1e-3 at 2048


class DistillConfig(TrainingConfig):
    """Distillation from a frozen teacher with its heads; no masking; the student's EMA is exported."""

    # A folder, or models:/NAME/VERSION.
    teacher_weights: str = Field(default=str(RELATIVE.weights("adapted")), min_length=1)

    students: dict[str, StudentConfig] = Field(min_length=1)
    share_teacher: bool = True  # train students concurrently; False: one after another, in less memory
    batch_size: PositiveInt = 2_048  # Table 16
    optimizer: DistillOptimizerConfig = DistillOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _students_fit(self) -> Self:
        if self.gram is not None:
            raise ValueError("gram anchors a student to its own average; distillation has a teacher: leave it out")
        for name, student in self.students.items():
            if name == "teacher" or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(
                    f"students: {name!r} cannot name a student; allowed: lower-case letters, digits, - and _, "
                    "but not 'teacher', which names the adapted model"
                )
            check_crops_fit(self.crops, student.backbone.patch_size, f"students.{name}.backbone")
        return self
