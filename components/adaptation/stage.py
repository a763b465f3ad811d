"""Adapt the pretrained model to a higher resolution: a short training on larger crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.adaptation.config import AdaptConfig
from components.core.layout import Layout
from components.data.stream import ImageStream
from components.training.config import check_crops_fit
from components.training.delivery import Delivery, train_and_deliver
from components.training.initial import load_network
from components.training.loop import Job
from components.training.networks import self_distillation
from components.training.parallelize import launch
from components.training.precision import resolve_precision


def run(config: AdaptConfig, root: Path, seed: int) -> dict[str, Any]:
    """Train models/pretrained on data/curated; write models/adapted and reports/adapt; return the run's figures."""
    return launch(adapt, config.num_processes, config, root, seed)


def adapt(config: AdaptConfig, root: Path, seed: int) -> dict[str, Any]:
    """Run the stage on one rank."""
    config = resolve_precision(config, "adapt")
    layout = Layout(root)
    pretrained = layout.weights("pretrained")
    student = load_network(pretrained, config.crops.global_size)
    check_crops_fit(config.crops, student.backbone.config.patch_size)
    # Not pretraining's seed, which would repeat its first images and crops.
    stream = ImageStream(layout.curated, config.stream, seed + 1)
    networks = self_distillation(student, with_gram_teacher=config.gram is not None)
    job = Job("adapt", config, networks, stream, config.masking, seed + 1)
    outputs = Delivery(root, layout.weights("adapted"), layout.report("adapt"), {"initial_weights": pretrained})
    return train_and_deliver(job, outputs)
