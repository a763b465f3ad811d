"""Pretrain a vision transformer on the curated set: DINO, iBOT and KoLeo, taught by its own moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.data.stream import ImageStream
from components.model.export import BACKBONE_FILE, check_sha256, load_published
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.pretraining.config import PretrainConfig
from components.training.delivery import Delivery, train_and_deliver
from components.training.loop import Job
from components.training.networks import Network, self_distillation
from components.training.parallelize import launch


def run(config: PretrainConfig, root: Path, seed: int) -> dict[str, Any]:
    """Train on data/curated; write models/pretrained and reports/pretrain; return the run's figures."""
    return launch(pretrain, config.num_processes, config, root, seed)


def pretrain(config: PretrainConfig, root: Path, seed: int) -> dict[str, Any]:
    """What one rank does."""
    stream = ImageStream(root / "data" / "curated", config.stream, seed)
    torch.manual_seed(seed)  # every rank draws the same initial weights
    heads = {"dino": config.dino_head, "ibot": config.ibot_head}
    backbone, parents = VisionTransformer(config.backbone), {}
    if config.init is not None:
        path = root / config.init.weights
        path = path / BACKBONE_FILE if path.is_dir() else path
        parents = {"initial_weights": path}
        check_sha256(path, config.init.sha256)
        backbone = load_published(path, config.backbone)
    student = Network(backbone, {name: ProjectionHead(config.backbone.dim, head) for name, head in heads.items()})
    networks = self_distillation(student, anchored=config.gram is not None)
    job = Job("pretrain", config, networks, stream, config.masking, seed)
    outputs = Delivery(root, root / "models" / "pretrained", root / "reports" / "pretrain", parents)
    return train_and_deliver(job, outputs)
