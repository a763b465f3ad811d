"""Configuration shared by all trainings: length, batch, optimizer, schedules, crops and objective.

Defaults are those of ViT-L/14 on ImageNet-22k: dinov2/configs/train/vitl14.yaml at commit b8931f7, and
arXiv:2304.07193, Table 16.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from components.core.config import Config
from components.data.config import CropConfig, StreamConfig
from components.objective.config import GramConfig, ObjectiveConfig


class OptimizerConfig(Config):
    """AdamW with layer-wise decay, and its schedules."""

    base_lr: PositiveFloat = 2e-4  # for 1024 images; scaled by sqrt(batch_size / 1024): 3.5e-4 at 3072
    min_lr: float = Field(default=1e-6, ge=0.0)
    warmup_steps: int = Field(default=100_000, ge=0)  # 80 epochs of 1,250
    weight_decay_start: float = Field(default=0.04, ge=0.0)
    weight_decay_end: float = Field(default=0.2, ge=0.0)
    layer_decay: float = Field(
        default=1.0, gt=0.0, le=1.0
    )  # learning rate x layer_decay for each block further from the head
    patch_embed_lr_factor: PositiveFloat = 0.2
    freeze_last_layer_steps: int = Field(default=1_250, ge=0)  # 1 epoch
    freeze_backbone_steps: int = Field(default=0, ge=0)  # train new heads alone; then warm up the backbone too
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    clip_grad_norm: PositiveFloat | None = 3.0  # separately for backbone and each head; None: no clipping


class TeacherConfig(Config):
    """Sharpening of the teacher's targets: a linear warm-up of the temperature, then constant."""

    temp_start: float = Field(default=0.04, gt=0.0, le=1.0)
    temp_end: float = Field(default=0.07, gt=0.0, le=1.0)
    temp_warmup_steps: int = Field(default=37_500, ge=0)  # 30 epochs

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.temp_start > self.temp_end:
            raise ValueError(f"temp_start {self.temp_start} is above temp_end {self.temp_end}; it may only rise")
        return self


class EmaConfig(Config):
    """Cosine schedule of the EMA momentum."""

    momentum_start: float = Field(default=0.994, ge=0.0, le=1.0)
    momentum_end: float = Field(default=1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.momentum_start > self.momentum_end:
            raise ValueError(f"momentum_start {self.momentum_start} is above momentum_end {self.momentum_end}")
        return self


class KnnProbeConfig(Config):
    """kNN accuracy on some labeled images of data/evaluation during training."""

    every_steps: PositiveInt
    num_images: int = Field(default=1_000, ge=2)  # held in memory; a fifth of them are test images
    num_neighbors: PositiveInt = 20


class AlertConfig(Config):
    """Limits beyond which a training raises an alert; it continues."""

    after_steps: int | None = Field(default=None, ge=0)  # check for collapse after these; None: optimizer.warmup_steps
    min_feature_std: float = Field(default=0.1, ge=0.0)  # 1: spread over the sphere; 0.1: mean cosine 0.99; 0: all same
    min_effective_rank: float = Field(default=2.0, ge=0.0)
    max_entropy_share: float = Field(default=0.995, gt=0.0)  # of log K, the entropy of a uniform target
    max_wait_share: float = Field(default=0.5, gt=0.0)  # of the time waiting for data, in two consecutive rows


class EnergyConfig(Config):
    """Energy = power x hours x PUE; CO2e = energy x intensity. Defaults: arXiv:2304.07193, Table 14."""

    device_watts: PositiveFloat | None = None  # of a GPU, or a CPU's rank; None: a known GPU's limit (A100: 400)
    pue: float = Field(default=1.1, ge=1.0)  # power usage effectiveness of the data center
    kg_co2e_per_kwh: float = Field(default=0.385, ge=0.0)


class MonitorConfig(Config):
    """Monitoring beside the losses. It does not affect the training."""

    knn: KnnProbeConfig | None = None
    pictures_every_steps: PositiveInt | None = None  # PCA of patch features, to the tracker; None: at the ends only
    alerts: AlertConfig = AlertConfig()
    energy: EnergyConfig = EnergyConfig()


class TrainingConfig(Config):
    """One training run; counts are in steps, and in images over all ranks together."""

    steps: PositiveInt = 625_000
    batch_size: PositiveInt = 3_072  # images a step, over all ranks
    # The released code uses float16 with a loss scaler, which bfloat16 does not need. auto: bfloat16 if all ranks
    # support it in hardware, else float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    accumulation_steps: PositiveInt = 1  # micro-batches per step; each has targets of its own
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"  # what to recompute
    compile: bool = False  # torch.compile of each block; needs a C++ compiler on the CPU
    num_processes: PositiveInt = 1  # ranks started on this machine; ignored under torchrun
    sharding: Literal["ddp", "fsdp"] = "ddp"  # fsdp: shard weights, EMA and moments over ranks; for large models
    checkpoint_uri: str | None = Field(default=None, pattern="^s3://[^/]+")  # None: .pedigree/checkpoints
    checkpoint_every_steps: PositiveInt = 3_750  # 3 epochs
    log_every_steps: PositiveInt = 10
    max_skipped_steps: int = Field(default=10, ge=0)  # steps with a non-finite loss; one more ends the run
    monitor: MonitorConfig = MonitorConfig()
    stream: StreamConfig = StreamConfig()
    crops: CropConfig = CropConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    gram: GramConfig | None = None  # Gram anchoring, in pretraining and adaptation
    optimizer: OptimizerConfig = OptimizerConfig()
    teacher: TeacherConfig = TeacherConfig()
    ema: EmaConfig = EmaConfig()

    @property
    def bfloat16(self) -> bool:
        """Whether networks compute in bfloat16; valid after `resolve_precision`."""
        assert self.precision != "auto", "precision is not resolved yet"
        return self.precision == "bfloat16"

    def phases(self) -> dict[str, int]:
        """Return the lengths of initial phases in steps, by key; a shortened run scales them."""
        optimizer = self.optimizer
        return {
            "optimizer.warmup_steps": optimizer.warmup_steps,
            "optimizer.freeze_last_layer_steps": optimizer.freeze_last_layer_steps,
            "optimizer.freeze_backbone_steps": optimizer.freeze_backbone_steps,
            "teacher.temp_warmup_steps": self.teacher.temp_warmup_steps,
        }

    def check_ranks(self, name: str, num_ranks: int) -> None:
        """Raise ValueError unless `num_ranks` ranks, described by `name`, can share the batch."""
        if self.accumulation_steps > 1:
            name, num_ranks = f"{name} * accumulation_steps", num_ranks * self.accumulation_steps
        least = 2 * num_ranks if self.objective.koleo_weight is not None else num_ranks
        check_divisible("batch_size", self.batch_size, name, num_ranks, least)
        if self.batch_size < least:
            raise ValueError(
                f"batch_size {self.batch_size} leaves a rank fewer than 2 images, and KoLeo needs a neighbor: "
                f"use {least} or a larger multiple of {num_ranks}, or set objective.koleo_weight to null"
            )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.check_ranks("num_processes", self.num_processes)
        for name, steps in self.phases().items():
            if steps > self.steps:
                raise ValueError(f"{name} is {steps}, more than the {self.steps} steps of the run")
        if self.optimizer.min_lr > self.optimizer.base_lr:
            raise ValueError(f"optimizer.min_lr {self.optimizer.min_lr} is above base_lr {self.optimizer.base_lr}")
        return self


def check_divisible(name: str, value: int, divisor_name: str, divisor: int, least: int = 1) -> None:
    """Raise ValueError unless `divisor` divides `value`; suggest the nearest valid value of at least `least`."""
    if value % divisor:
        nearest = max(math.ceil(least / divisor), round(value / divisor)) * divisor
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}; use for example {nearest}")


def check_crops_fit(crops: CropConfig, patch_size: int, of: str = "backbone", section: str = "") -> None:
    """Raise ValueError unless both crop sizes in `section` are multiples of the patch size of the network `of`."""
    for key, size in (("crops.global_size", crops.global_size), ("crops.local_size", crops.local_size)):
        check_divisible(f"{section}{key}", size, f"{of}.patch_size", patch_size)
