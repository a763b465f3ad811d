"""Pretraining from random weights. Defaults: ViT-L/14 of dinov2/configs/train/vitl14.yaml, with registers."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from components.data.config import MaskingConfig
from components.model.config import HeadConfig, ViTConfig
from components.training.config import TrainingConfig, check_crops_fit


class PretrainConfig(TrainingConfig):
    """A student taught by its own moving average."""

    backbone: ViTConfig = ViTConfig(ffn="swiglu", drop_path=0.4)  # Table 16; drop_path 0.4 for L and g
    dino_head: HeadConfig = HeadConfig(num_prototypes=131_072, bottleneck_dim=384)  # vitl14.yaml
    ibot_head: HeadConfig = HeadConfig(num_prototypes=131_072, bottleneck_dim=256)
    masking: MaskingConfig = MaskingConfig()

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        check_crops_fit(self.crops, self.backbone.patch_size)
        return self
