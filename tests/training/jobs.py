"""A small pretraining job, for tests that need its networks in their hands."""

from __future__ import annotations

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
