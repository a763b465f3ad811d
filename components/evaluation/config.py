"""Parameters of the evaluation. Imports no torch, so that the CLI starts fast."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from components.core.config import Config
from components.core.references import EXACT_URI
from components.model.config import Preprocessing

# 10^-6 to 10^5 in 45 steps: C_POWER_RANGE of dinov2/eval/log_regression.py.
PAPER_C_GRID = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))


# They train 52 heads, train heads on four layers at once, or take passes over several sizes or 75 corrupted images.
LongProtocol = Literal["probe", "retrieval-ms", "segmentation-lin4", "segmentation-ms", "depth-lin4", "robustness"]
LONG_PROTOCOLS: tuple[LongProtocol, ...] = get_args(LongProtocol)

Version = Annotated[str, Field(pattern=EXACT_URI)]  # no alias: an input must not change


class KnnConfig(Config):
    """Nearest-neighbor classification (dinov2/eval/knn.py)."""

    num_neighbors: tuple[PositiveInt, ...] = Field(default=(10, 20, 100, 200), min_length=1)
    reported: PositiveInt = 20  # its accuracy is `knn_top1`; "20 usually works best", says the code's help text
    temperature: PositiveFloat = 0.07
    few_shot: tuple[PositiveInt, ...] = ()  # train images per class, such as (1, 5); none: only all train images
    tries: int = Field(default=10, ge=2)  # draws of the few shots, whose accuracies are averaged

    @model_validator(mode="after")
    def _reported_is_measured(self) -> Self:
        if self.reported not in self.num_neighbors:
            raise ValueError(f"reported must be one of num_neighbors {list(self.num_neighbors)}, not {self.reported}")
        return self


class LinearConfig(Config):
    """Logistic regression on frozen features (dinov2/eval/log_regression.py, which resizes to 224 instead of 256)."""

    c_grid: tuple[PositiveFloat, ...] = Field(default=PAPER_C_GRID, min_length=1)  # inverse strengths of the L2 penalty
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)  # of train, at random, to choose C on
    max_iterations: PositiveInt = 1000
    tolerance: PositiveFloat = 1e-12


class InstanceConfig(Config):
    """Retrieval of an image by an augmented view of it: the evaluation without labels."""

    num_queries: PositiveInt = 2000  # at most; images drawn at random
    crop_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area in a view
    jitter: float = Field(default=0.3, ge=0, lt=1)  # brightness, contrast and saturation change by up to this factor

    @field_validator("crop_scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two shares of the area, 0 < low <= high <= 1")
        return value


class EvaluateConfig(Config):
    """Measures of a frozen backbone on data/evaluation. Defaults: METHOD of DINOv2 (arXiv:2304.07193, App. B)."""

    models: dict[str, str]  # name -> weights folder; `dvc.yaml` evaluates each of them
    preprocessing: Preprocessing = Preprocessing()  # crop_size: a multiple of the backbone's patch size
    batch_size: PositiveInt = 256
    num_workers: int = Field(default=8, ge=0)  # processes that decode images; 0 decodes in the stage's own
    champions: dict[str, Version] = Field(default_factory=dict)  # model -> its current champion, if any
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    instance: InstanceConfig = InstanceConfig()
    long_protocols: tuple[LongProtocol, ...] = ()  # of a set's task, besides those that always run

    @model_validator(mode="after")
    def _champions_are_of_models(self) -> Self:
        if unknown := sorted(set(self.champions) - set(self.models)):
            raise ValueError(f"champions: {unknown[0]!r} is not among models {sorted(self.models)}")
        return self

    @property
    def batch_bytes(self) -> int:
        """Bytes of one batch of images."""
        return 3 * self.batch_size * self.preprocessing.crop_size**2


class DenseHeadConfig(Config):
    """Training of a linear head on frozen patch tokens: AdamW, linear warm-up, then half a cosine to zero."""

    learning_rates: tuple[PositiveFloat, ...] = Field(min_length=1)  # the best on a part of train is taken
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)  # of the train images, at random, to choose it on
    weight_decay: float = Field(ge=0)
    batch_size: PositiveInt = 16  # dinov3/eval/{segmentation,depth}/config.py: 8 GPUs with 2 images each
    steps: PositiveInt
    warmup_steps: int = Field(ge=0)

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self


class SegmentationConfig(DenseHeadConfig):
    """Linear segmentation (arXiv:2304.07193, sec. 7.4).

    DINOv2 released no training code for it; values are those of dinov3's config-ade20k-linear-training.yaml.
    """

    learning_rates: tuple[PositiveFloat, ...] = Field(default=(3e-4, 1e-3, 3e-3), min_length=1)  # dinov3: 1e-3
    weight_decay: float = Field(default=1e-3, ge=0)
    steps: PositiveInt = 40_000
    warmup_steps: int = Field(default=1_500, ge=0)


class DepthConfig(DenseHeadConfig):
    """Linear depth (arXiv:2304.07193, sec. 7.4; dinov2/eval/depth); training values of dinov3's linear NYU recipe."""

    learning_rates: tuple[PositiveFloat, ...] = Field(default=(1e-4, 3e-4, 1e-3), min_length=1)  # dinov3: 3e-4
    weight_decay: float = Field(default=1e-4, ge=0)
    steps: PositiveInt = 38_400
    warmup_steps: int = Field(default=1_500, ge=0)  # as for segmentation: neither paper says
    num_bins: int = Field(default=256, ge=2)  # uniform, between the ends of the set's range


class ProbeConfig(Config):
    """Linear probe: one grid of heads trained at once (dinov2/eval/linear.py and its default arguments)."""

    learning_rates: tuple[PositiveFloat, ...] = Field(  # for a batch of 256; scaled by batch_size / 256
        default=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1), min_length=1
    )
    num_layers: tuple[PositiveInt, ...] = Field(default=(1, 4), min_length=1)  # last layers whose class tokens are read
    num_steps: PositiveInt = 12_500  # 10 x 1,250
    batch_size: PositiveInt = 1024  # 8 GPUs x 128
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)  # of train, at random, to choose the head on


class SlicesConfig(Config):
    """Accuracy by group of test images."""

    min_images: PositiveInt = 20  # of a group that can be the worst or best; Wilson's interval is then up to 0.4 wide
