"""Adaptation to high resolution: a short training on large crops, from pretrained weights (arXiv:2304.07193, B.2)."""

from __future__ import annotations

from pydantic import PositiveInt

from components.data.config import CropConfig, MaskingConfig
from components.training.config import OptimizerConfig, TeacherConfig, TrainingConfig


class AdaptConfig(TrainingConfig):
    """The schedules of pretraining, compressed; backbone and heads are those of models/pretrained."""

    steps: PositiveInt = 10_000  # B.2
    crops: CropConfig = CropConfig(global_size=518, local_size=224)  # 518: B.2; local not published: same proportion
    optimizer: OptimizerConfig = OptimizerConfig(
        base_lr=2e-5,  # "lower", value not published: a tenth of pretraining's
        warmup_steps=1_600,  # pretraining's 100,000 of 625,000, compressed
        freeze_last_layer_steps=0,  # the heads are trained already
    )
    teacher: TeacherConfig = TeacherConfig(temp_warmup_steps=600)  # 37,500 of 625,000, compressed
    masking: MaskingConfig = MaskingConfig()
