"""A small pretraining job, for tests that need its networks in their hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from components.core.config import validate
from components.data.stream import ImageStream
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.pretraining.config import PretrainConfig
from components.training.loop import Job
from components.training.networks import Network, self_distillation


def make_job(values: dict[str, Any], curated: Path) -> Job:
    """The job of pretraining with these values on `curated`, at its start."""
    config = validate(PretrainConfig, values, "test")
    torch.manual_seed(0)
    heads = {"dino": config.dino_head, "ibot": config.ibot_head}
    student = Network(
        VisionTransformer(config.backbone), {n: ProjectionHead(config.backbone.dim, h) for n, h in heads.items()}
    )
    stream = ImageStream(curated, config.stream, seed=0)
    return Job("pretrain", config, self_distillation(student), stream, config.masking, seed=0)


def at_step(job: Job, number: int, action: Callable[[], None]) -> None:
    """Do something when the student is called for the step `number`, counted from 0 at the start of this job."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(None)
        if len(calls) == number + 1:
            action()

    job.networks.student.register_forward_pre_hook(hook)


def break_step(job: Job, number: int) -> None:
    """Let the student's class-token logits be NaN in the step `number`."""
    broken: list[None] = []

    def hook(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor | None:
        return logits * float("nan") if broken else None

    job.networks.student.dino_head.register_forward_hook(hook)
    at_step(job, number, lambda: broken.append(None))
    at_step(job, number + 1, broken.clear)
