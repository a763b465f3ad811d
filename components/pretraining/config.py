"""Pretraining from random weights. Defaults: ViT-L/14 of dinov2/configs/train/vitl14.yaml, with registers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.core.config import Config
from components.data.config import MaskingConfig
from components.model.config import HeadConfig, ViTConfig
from components.objective.config import GramConfig
from components.training.config import TrainingConfig, check_crops_fit


class InitConfig(Config):
    """Initial weights of the backbone, such as the published ones, which lack heads."""

    weights: str  # .safetensors or .pth of published names, or a weights folder; absolute, or below the workspace
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the file, or of the folder's model.safetensors


class PretrainViTConfig(ViTConfig):
    """Vision transformer trained from scratch: ViT-L/14 of Table 16."""

    ffn: Literal["mlp", "swiglu"] = "swiglu"
    drop_path: float = Field(default=0.4, ge=0, lt=1)  # for L and g


class DinoHeadConfig(HeadConfig):
    """Head for class tokens (vitl14.yaml)."""

    num_prototypes: int = Field(default=131_072, ge=2, le=4194304)
    bottleneck_dim: int = Field(default=384, ge=1, le=65536)


class IbotHeadConfig(HeadConfig):
    """Head for patch tokens (vitl14.yaml)."""

    num_prototypes: int = Field(default=131_072, ge=2, le=4194304)


class PretrainGramConfig(GramConfig):
    """Gram anchoring in pretraining; required `after_steps`, because it would anchor to random weights otherwise."""

    after_steps: int = Field(ge=0)  # DINOv3: 1,000,000; in its ablation 200,000


class PretrainConfig(TrainingConfig):
    """A student taught by its own moving average."""

    init: InitConfig | None = None  # None: random weights

    backbone: PretrainViTConfig = PretrainViTConfig()
    gram: PretrainGramConfig | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    dino_head: DinoHeadConfig = DinoHeadConfig()
    ibot_head: IbotHeadConfig = IbotHeadConfig()
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
