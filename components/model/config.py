"""Shape of the vision transformer and of its projection heads. Imports no torch, so that the CLI starts fast."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.core.config import Config


class ViTConfig(Config):
    """Vision transformer. Defaults: DINOv2 ViT-L/14 with registers (`dinov2/hub/backbones.py`, `dinov2_vitl14_reg`)."""

    patch_size: int = Field(default=14, ge=1, le=256)  # DINOv2 Table 17; the ImageNet-1k recipe uses 16
    dim: int = Field(default=1024, ge=1, le=16384)  # S 384, B 768, L 1024, g 1536
    depth: int = Field(default=24, ge=1, le=256)  # S and B 12, L 24, g 40
    num_heads: int = Field(default=16, ge=1, le=256)  # head dim 64 in all published sizes
    ffn: Literal["mlp", "swiglu"] = "mlp"  # from scratch L and g use swiglu, distilled models mlp
    ffn_ratio: float = Field(default=4.0, ge=0.5, le=64)  # swiglu takes 2/3 of it, rounded up to a multiple of 8
    num_registers: int = Field(default=4, ge=0, le=64)  # arXiv 2309.16588; published models have 0 or 4
    # Pixels; the stored position grid is image_size / patch_size. None: size of the global crops, as in the released
    # training code (518 is only in evaluation configs). Training would determine only a part of a larger grid.
    image_size: int | None = Field(default=None, ge=1, le=16384)
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # same rate in all blocks; from scratch 0.3 to 0.4, distilled 0
    layer_scale_init: float = Field(default=1e-5, gt=0)  # `layerscale` of ssl_default_config.yaml
    interpolate_antialias: bool = True  # false for the published models without registers
    interpolate_offset: float = Field(default=0.0, ge=0, lt=1)  # 0.1 for the published models without registers

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, but {self.dim} is not one of {self.num_heads}")
        if self.image_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, but {self.image_size} is not one of {self.patch_size}"
            )
        return self

    def trained_at(self, global_size: int) -> ViTConfig:
        """Return this shape with `image_size` set to the global crop size if it is None."""
        return self if self.image_size else self.model_copy(update={"image_size": global_size})


# What a feature is made of: `cls` the class token, as in DINOv2's evaluations; `cls_texture` also how strongly the
# patch tokens of the last layers vary over the image (`pooling.py`).
Pooling = Literal["cls", "cls_texture"]
LAST_LAYERS = 4  # of which evaluations read tokens (dinov2/eval/linear.py); of shallower networks all


class Preprocessing(Config):
    """How an image becomes a feature: resized, cropped, and its tokens pooled.

    Defaults: `make_classification_eval_transform` and class tokens, as in DINOv2.
    """

    resize_size: int = Field(default=256, ge=1, le=16384)  # pixels of the shorter side, bicubic
    crop_size: int = Field(default=224, ge=1, le=16384)  # pixels of the center crop
    pooling: Pooling = "cls"

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop_size > self.resize_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than resize_size {self.resize_size}")
        return self

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes of resize and crop: images of equal sizes are the same pixels."""
        return self.resize_size, self.crop_size

    def at(self, crop_size: int) -> Preprocessing:
        """Return the same crop region at another resolution."""
        resize_size = round(crop_size * self.resize_size / self.crop_size)
        return Preprocessing(resize_size=resize_size, crop_size=crop_size, pooling=self.pooling)

    @property
    def pooled(self) -> str:
        """The parts of a feature, in words."""
        return "class tokens" if self.pooling == "cls" else "class tokens and how strongly patch tokens vary"

    def num_layers(self, shape: ViTConfig) -> int:
        """Return of how many last layers the pooling reads tokens."""
        return 1 if self.pooling == "cls" else min(LAST_LAYERS, shape.depth)

    def feature_dim(self, shape: ViTConfig) -> int:
        """Return the length of a feature."""
        return shape.dim if self.pooling == "cls" else shape.dim * (1 + self.num_layers(shape))


class HeadConfig(Config):
    """Projection head. Defaults: `dino` and `ibot` of DINOv2's `ssl_default_config.yaml` (L and g use 131,072)."""

    num_prototypes: int = Field(default=65536, ge=2, le=4194304)
    hidden_dim: int = Field(default=2048, ge=1, le=65536)
    bottleneck_dim: int = Field(default=256, ge=1, le=65536)  # dino head of vitl14 and vitg14: 384
    num_layers: int = Field(default=3, ge=1, le=16)
