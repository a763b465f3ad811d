"""Weights and temperatures of the training objective. Imports no torch, so that the CLI starts fast."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from components.core.config import Config


class GramConfig(Config):
    """Gram anchoring to frozen snapshots of the EMA. Defaults: DINOv3's `dinov3_vit7b16_gram_anchor.yaml`."""

    weight: float = Field(default=2.0, gt=0)
    teacher_scale: Literal[1, 2] = 2  # 2: crops at twice the resolution, without color augmentation
    after_steps: int = Field(default=0, ge=0)  # of this run; the first snapshot is taken then
    snapshot_every_steps: int = Field(default=10_000, ge=1)
    max_snapshots: int = Field(default=4, ge=1)  # the first and three replacements


class ObjectiveConfig(Config):
    """DINO + iBOT + KoLeo. Defaults: DINOv2's `ssl_default_config.yaml`, centering as in its L/14 and g/14 recipes."""

    dino_weight: float = Field(default=1.0, ge=0)
    ibot_weight: float = Field(default=1.0, ge=0)
    koleo_weight: float | None = 0.1  # None: no KoLeo
    student_temp: float = Field(default=0.1, gt=0)  # DINO and iBOT alike
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"  # softmax in the ImageNet-1k recipe
    sinkhorn_iterations: int = Field(default=3, ge=1, le=100)
    center_momentum: float = Field(default=0.9, ge=0, lt=1)  # of the softmax centering's running mean

    @field_validator("koleo_weight")
    @classmethod
    def _null_is_off(cls, weight: float | None) -> float | None:
        if weight is not None and weight <= 0:
            raise ValueError("a weight must be greater than 0; write null to train without KoLeo")
        return weight
