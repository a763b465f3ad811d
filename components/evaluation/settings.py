"""Settings of the protocols for one evaluation set: the papers' where the set is as large as theirs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from components.data.evalset import Evalset
from components.evaluation.config import (
    DenseHeadConfig,
    DepthConfig,
    EvaluateConfig,
    InstanceConfig,
    KnnConfig,
    LinearConfig,
    ProbeConfig,
    SegmentationConfig,
    SlicesConfig,
)
from components.evaluation.tokens import Loading
from components.model.config import Preprocessing

FEWEST_STEPS = 300  # of a trained head, however few images there are
# Passes over the train images in the papers: 12,500 steps of 1,024 over the 1,281,167 of ImageNet, 40,000 of 16 over
# the 20,210 of ADE20k, 38,400 of 16 over the 24,231 of NYU Depth (METHOD.md 6.1).
PROBE_PASSES, SEGMENTATION_PASSES, DEPTH_PASSES = 10.0, 31.7, 25.4

HeadConfigT = TypeVar("HeadConfigT", bound=DenseHeadConfig)


@dataclass(frozen=True)
class Settings:
    """Settings of all protocols, and of the reading of images."""

    loading: Loading
    knn: KnnConfig
    linear: LinearConfig
    instance: InstanceConfig
    probe: ProbeConfig
    slices: SlicesConfig
    segmentation: SegmentationConfig
    depth: DepthConfig

    def lines(self, protocols: Collection[str]) -> list[str]:
        """Return how long the heads of these protocols are trained, as lines."""
        trained = {
            "probe": (self.probe.num_steps, ProbeConfig().num_steps, self.probe.batch_size),
            "segmentation": (self.segmentation.steps, SegmentationConfig().steps, self.segmentation.batch_size),
            "depth": (self.depth.steps, DepthConfig().steps, self.depth.batch_size),
        }
        return [
            f"{name}: heads are trained for {steps:,} steps of {batch_size:,} images, in the paper {papers:,}"
            for name, (steps, papers, batch_size) in trained.items()
            if any(protocol.partition("-")[0] == name for protocol in protocols)
        ]


def settings_for(evalset: Evalset, config: EvaluateConfig) -> Settings:
    """Return the papers' settings, with as many passes over a smaller set, but no fewer than `FEWEST_STEPS` steps.

    Args:
        evalset: gives the number of train images.
        config: of the stage `evaluate`, which gives those of kNN, regression and views, and how images are read.
    """
    return Settings(
        Loading(config.batch_size, config.num_workers),
        config.knn,
        config.linear,
        config.instance,
        _probe(ProbeConfig(), len(evalset.train)),
        SlicesConfig(),
        _scaled(SegmentationConfig(), SEGMENTATION_PASSES, evalset),
        _scaled(DepthConfig(), DEPTH_PASSES, evalset),
    )


def scaled(preprocessing: Preprocessing, evalset: Evalset, patch_size: int | None) -> Preprocessing:
    """Return how a model's images of a set are scaled: as it states, but the whole middle square where places count.

    Args:
        preprocessing: of the model.
        evalset: may ask for a resolution, of which as many pixels are taken as patches tile.
        patch_size: of the model; None: it takes images of its own size only.
    """
    asked, found = evalset.config.resolution, preprocessing
    if asked is not None and patch_size is not None:
        found = preprocessing.at(max(patch_size, asked // patch_size * patch_size))
    whole = evalset.config.task not in ("classification", "video")
    return found.model_copy(update={"resize_size": found.crop_size}) if whole else found


def _probe(config: ProbeConfig, images: int) -> ProbeConfig:
    learned = images - round(images * config.validation_fraction)
    batch_size = max(2, min(config.batch_size, learned))
    steps = min(config.num_steps, max(FEWEST_STEPS, round(PROBE_PASSES * images / batch_size)))
    return config.model_copy(update={"batch_size": batch_size, "num_steps": steps})


def _scaled(config: HeadConfigT, passes: float, evalset: Evalset) -> HeadConfigT:
    steps = min(config.steps, max(FEWEST_STEPS, round(passes * len(evalset.train) / config.batch_size)))
    if steps == config.steps:
        return config
    warmup = round(config.warmup_steps * steps / config.steps)
    return config.model_copy(update={"steps": steps, "warmup_steps": warmup})
