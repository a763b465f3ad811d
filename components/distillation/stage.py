"""Distil a teacher into one student: the training objective, with the teacher frozen and nothing masked."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import torch

from components.core.tracking import download_weights
from components.data.stream import ImageStream
from components.distillation.config import DistillConfig
from components.model.export import HEADS_FILE
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.delivery import Delivery, train_and_deliver
from components.training.loop import Job
from components.training.networks import Network, distillation, load_network
from components.training.parallelize import launch


def run(config: DistillConfig, root: Path, seed: int, student: str) -> dict[str, Any]:
    """Distil the teacher on data/curated; write models/students/S and reports/distill/S; return the run's figures."""
    if student not in config.students:
        raise ValueError(f"no student {student!r} in distill.students; there are: {', '.join(config.students)}")
    teacher = find_teacher(config.teacher_weights, root)
    return launch(distill, config.num_processes, config, root, seed, student, teacher)


def find_teacher(weights: str, root: Path) -> Path:
    """The teacher's weights folder, fetched if it is a registered version.

    Raises:
        ValueError: an alias, or weights that were registered without heads.
        TrackingError: the registry does not answer, or has no such version.
    """
    if not weights.startswith("models:/"):
        return root / weights
    if "@" in weights:
        raise ValueError(
            f"distill.teacher_weights {weights}: an alias moves, so it is no input; `pedigree run` writes the version "
            "it has today, or give models:/NAME/VERSION"
        )
    (root / ".pedigree").mkdir(exist_ok=True)
    with (root / ".pedigree" / "teacher.lock").open("w") as lock:  # ranks of one machine fetch it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = download_weights(weights, root)
    if not (folder / HEADS_FILE).is_file():
        raise ValueError(
            f"distill.teacher_weights {weights}: registered without heads, which students learn from; teachers have "
            "them (NAME or NAME-candidates), students do not (NAME-STUDENT)"
        )
    return folder


def distill(config: DistillConfig, root: Path, seed: int, student: str, teacher_weights: Path) -> dict[str, Any]:
    """What one rank does."""
    shape = config.students[student].backbone
    teacher = load_network(teacher_weights)
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
        root,
        root / "models" / "students" / student,
        root / "reports" / "distill" / student,
        {"teacher": teacher_weights},
    )
    return train_and_deliver(job, outputs)
