"""Parameters of the training stream, crops and masks. Imports no torch, so that the CLI starts fast."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from components.core.config import Config

Origin = Literal["seed", "retrieved", "balanced"]  # column `origin` of the curated manifest
ORIGINS: tuple[Origin, ...] = get_args(Origin)


class MaskingConfig(Config):
    """Masking of the student's patches. Defaults: `ibot` of DINOv2's `ssl_default_config.yaml`."""

    mask_probability: float = Field(default=0.5, ge=0, le=1)  # share of a batch's global crops that are masked
    mask_ratio_min: float = Field(default=0.1, ge=0, le=1)  # of a masked crop's patches
    mask_ratio_max: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _ratios_in_order(self) -> Self:
        if self.mask_ratio_min > self.mask_ratio_max:
            raise ValueError(
                f"mask_ratio_min must not exceed mask_ratio_max, but {self.mask_ratio_min} > {self.mask_ratio_max}"
            )
        return self


class BlurProbability(Config):
    """Effective blur probability, by kind of crop.

    dinov2/data/transforms.py passes 1 - p to RandomApply, so that p = 1.0, 0.1 and 0.5 in augmentations.py mean 0.0,
    0.9 and 0.5; all released weights were trained with these (dinov3 issue 286).
    """

    global1: float = Field(default=0.0, ge=0.0, le=1.0)
    global2: float = Field(default=0.9, ge=0.0, le=1.0)
    local: float = Field(default=0.5, ge=0.0, le=1.0)


NUM_GLOBAL = 2  # the objective pairs crops: the teacher's output for one is the other's target


class CropConfig(Config):
    """Two global crops and several local ones of each image (dinov2/data/augmentations.py)."""

    global_size: PositiveInt = 224  # pixels
    local_size: PositiveInt = 98  # 96 with patches of 16
    num_local: int = Field(default=8, ge=0)
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    color_jitter_probability: float = Field(default=0.8, ge=0.0, le=1.0)
    brightness: float = Field(default=0.4, ge=0.0, le=1.0)
    contrast: float = Field(default=0.4, ge=0.0, le=1.0)
    saturation: float = Field(default=0.2, ge=0.0, le=1.0)
    hue: float = Field(default=0.1, ge=0.0, le=0.5)
    grayscale_probability: float = Field(default=0.2, ge=0.0, le=1.0)
    blur_probability: BlurProbability = BlurProbability()
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_probability: float = Field(default=0.2, ge=0.0, le=1.0)  # second global crop only

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(f"{name} is {low} to {high}; allowed: 0 < from <= to <= 1 (share of the image's area)")
        low, high = self.blur_sigma
        if not 0.0 < low <= high:
            raise ValueError(f"blur_sigma is {low} to {high}; allowed: 0 < from <= to")
        return self


class StreamConfig(Config):
    """Reading of the curated set."""

    num_workers: int = Field(default=10, ge=0)  # processes that read, decode and crop; 0: in the training process
    window_shards: PositiveInt = 16  # images are shuffled within windows of this many shuffled shards
    cache_gib: PositiveFloat = 40.0  # for shards streamed from S3; at least two windows
    mix: dict[Origin, float] | None = None  # share of each part in the stream; None: the set as it is
    max_bad_images: int = Field(default=100, ge=0)  # distinct undecodable images that a rank may skip since its start

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        if self.mix is None:
            return self
        shares = [Fraction(str(share)) for share in self.mix.values()]
        if sum(shares) != 1 or min(shares, default=0) <= 0 or any(1000 % share.denominator for share in shares):
            raise ValueError(f"mix is {self.mix}; allowed: shares above 0 in steps of 0.001 that add up to 1")
        return self
