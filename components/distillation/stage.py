"""Distil the adapted model into one student: the training objective, with a frozen teacher and nothing masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.data.stream import ImageStream
from components.distillation.config import DistillConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.delivery import Delivery, train_and_deliver
from components.training.loop import Job
from components.training.networks import Network, distillation, load_network
from components.training.parallelize import launch


def run(config: DistillConfig, root: Path, seed: int, student: str) -> dict[str, Any]:
    """Distil models/adapted on data/curated; write models/students/S and reports/distill/S; return its figures."""
    if student not in config.students:
        raise ValueError(f"no student {student!r} in distill.students; there are: {', '.join(config.students)}")
    return launch(distill, config.num_processes, config, root, seed, student)


def distill(config: DistillConfig, root: Path, seed: int, student: str) -> dict[str, Any]:
    """What one rank does."""
    adapted = root / "models" / "adapted"
    shape = config.students[student].backbone
    teacher = load_network(adapted)
    theirs = teacher.backbone.config.patch_size
    if shape.patch_size != theirs:
        raise ValueError(
            f"distill.students.{student}.backbone.patch_size is {shape.patch_size}, the teacher's is {theirs}: "
            "patches are compared one to one, so they must be equal"
        )
    torch.manual_seed(seed)  # every rank draws the same initial weights
    heads = {name: ProjectionHead(shape.dim, head.config) for name, head in teacher.heads.items()}
    networks = distillation(Network(VisionTransformer(shape), heads), teacher)
    # Only this student matters to its run: another one's change must not make it start anew.
    config = config.model_copy(update={"students": {student: config.students[student]}})
    stream = ImageStream(root / "data" / "curated", config.stream, seed)
    job = Job(f"distill/{student}", config, networks, stream, masking=None, seed=seed)
    outputs = Delivery(
        root, root / "models" / "students" / student, root / "reports" / "distill" / student, {"teacher": adapted}
    )
    return train_and_deliver(job, outputs)
