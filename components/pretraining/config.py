"""Pretraining from random weights. Defaults: ViT-L/14 of dinov2/configs/train/vitl14.yaml, with registers."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from components.core.config import Config
from components.data.config import MaskingConfig
from components.model.config import HeadConfig, ViTConfig
from components.training.config import TrainingConfig, check_crops_fit


class InitConfig(Config):
    """Weights of a backbone to start from, such as the published ones, which come without heads."""

    weights: str  # .safetensors or .pth of published names, or a weights folder; absolute, or below the workspace
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the file, or of the folder's model.safetensors


class PretrainConfig(TrainingConfig):
    """A student taught by its own moving average."""

    init: InitConfig | None = None  # None: random weights

    backbone: ViTConfig = ViTConfig(ffn="swiglu", drop_path=0.4)  # Table 16; drop_path 0.4 for L and g
    dino_head: HeadConfig = HeadConfig(num_prototypes=131_072, bottleneck_dim=384)  # vitl14.yaml
    ibot_head: HeadConfig = HeadConfig(num_prototypes=131_072, bottleneck_dim=256)
    masking: MaskingConfig = MaskingConfig()

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        check_crops_fit(self.crops, self.backbone.patch_size)
        if self.init and not self.optimizer.freeze_backbone_steps:
            raise ValueError(
                "init starts from trained weights under new heads, which would ruin them at once: set "
                "optimizer.freeze_backbone_steps, for example to optimizer.warmup_steps"
            )
        return self
