"""Pretrain a vision transformer on the curated set: DINO, iBOT and KoLeo, taught by its own moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.core.layout import Layout
from components.data.stream import ImageStream
from components.model.export import BACKBONE_FILE
from components.model.published import check_sha256, published_tensors
from components.pretraining.config import PretrainConfig
from components.training.delivery import Delivery, train_and_deliver
from components.training.initial import draw_network, start_backbone_from
from components.training.loop import Job
from components.training.networks import self_distillation
from components.training.parallelize import launch
from components.training.precision import resolve_precision


def run(config: PretrainConfig, root: Path, seed: int) -> dict[str, Any]:
    """Train on data/curated; write models/pretrained and reports/pretrain; return the run's figures."""
    return launch(pretrain, config.num_processes, config, root, seed)


def pretrain(config: PretrainConfig, root: Path, seed: int) -> dict[str, Any]:
    """Run the stage on one rank."""
    config = resolve_precision(config, "pretrain")
    layout = Layout(root)
    stream = ImageStream(layout.curated, config.stream, seed)
    shape = config.backbone.trained_at(config.crops.global_size)
    student = draw_network(shape, {"dino": config.dino_head, "ibot": config.ibot_head}, seed)
    parents = {}
    if config.init is not None:
        path = root / config.init.weights
        path = path / BACKBONE_FILE if path.is_dir() else path
        parents = {"initial_weights": path}
        check_sha256(path, config.init.sha256)
        start_backbone_from(student, published_tensors(path, shape))
    networks = self_distillation(student, with_gram_teacher=config.gram is not None)
    job = Job("pretrain", config, networks, stream, config.masking, seed)
    outputs = Delivery(root, layout.weights("pretrained"), layout.report("pretrain"), parents)
    return train_and_deliver(job, outputs)
