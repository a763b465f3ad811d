"""Adaptation to high resolution: a short training on large crops, from pretrained weights (arXiv:2304.07193, B.2)."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from components.data.config import CropConfig, MaskingConfig
from components.training.config import OptimizerConfig, TeacherConfig, TrainingConfig


class AdaptCropConfig(CropConfig):
    """Crops of high resolution."""

    global_size: PositiveInt = 518  # B.2
    local_size: PositiveInt = 224  # not published: same proportion


class AdaptOptimizerConfig(OptimizerConfig):
    """AdamW for trained weights."""

    base_lr: PositiveFloat = 2e-5  # "lower", value not published: a tenth of pretraining's
    warmup_steps: int = Field(default=1_600, ge=0)  # pretraining's 100,000 of 625,000, compressed
    freeze_last_layer_steps: int = Field(default=0, ge=0)  # the heads are already trained


class AdaptTeacherConfig(TeacherConfig):
    """Sharpening with a compressed warm-up."""

    temp_warmup_steps: int = Field(default=600, ge=0)  # 37,500 of 625,000, compressed


class AdaptConfig(TrainingConfig):
    """The schedules of pretraining, compressed; backbone and heads are those of models/pretrained."""

    steps: PositiveInt = 10_000  # B.2
    # pyright takes fields of frozen models for mutable, hence invariant.
    crops: AdaptCropConfig = AdaptCropConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    optimizer: AdaptOptimizerConfig = AdaptOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher: AdaptTeacherConfig = AdaptTeacherConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    masking: MaskingConfig = MaskingConfig()
