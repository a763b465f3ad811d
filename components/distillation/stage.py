"""Distil a teacher into students: the training objective, with the teacher frozen and nothing masked.

Each student is a stage. The first stage that runs trains all students that are due, step by step on the same batches,
so that the teacher looks at an image once; the stages of the others take up what is theirs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from components.core.config import ConfigError
from components.core.layout import Layout
from components.core.locks import exclusive
from components.core.references import ModelReference, is_registered
from components.core.registered_weights import download_weights
from components.data.stream import ImageStream
from components.distillation.config import DistillConfig
from components.model.export import HEADS_FILE
from components.training.delivery import Beside, Delivery, train_and_deliver
from components.training.initial import draw_network, load_network
from components.training.loop import Job
from components.training.networks import Network, distillation
from components.training.parallelize import launch
from components.training.precision import resolve_precision


def run(config: DistillConfig, root: Path, seed: int, student: str) -> dict[str, Any]:
    """Distil the teacher on data/curated; write models/students/S and reports/distill/S; return the run's figures."""
    if student not in config.students:
        raise ConfigError(f"no student {student!r} in distill.students; there are: {', '.join(config.students)}")
    teacher = find_teacher(config.teacher_weights, root)
    return launch(distill, config.num_processes, config, root, seed, student, teacher)


def find_teacher(weights: str, root: Path) -> Path:
    """The teacher's weights folder, fetched if it is a registered version.

    Raises:
        ConfigError: an alias, or weights that were registered without heads.
        TrackingError: the registry does not answer, or has no such version.
    """
    if not is_registered(weights):
        return root / weights
    if (named := ModelReference.of_uri(weights)) and named.alias:
        raise ConfigError(
            f"distill.teacher_weights {weights}: an alias moves, so it is no input; `pedigree run` writes the version "
            "it has today, or give models:/NAME/VERSION"
        )
    with exclusive(Layout(root).state / "teacher.lock"):  # ranks of one machine fetch it once
        folder = download_weights(weights, root)
    if not (folder / HEADS_FILE).is_file():
        raise ConfigError(
            f"distill.teacher_weights {weights}: registered without heads, which students learn from; teachers have "
            "them (NAME or NAME-candidates), students do not (NAME-STUDENT)"
        )
    return folder


def distill(config: DistillConfig, root: Path, seed: int, student: str, teacher_weights: Path) -> dict[str, Any]:
    """What one rank does: train the student, and beside it the others whose weights are missing or out of date."""
    config = resolve_precision(config, "distill")
    teacher = load_network(teacher_weights)
    check_patch_sizes(config, teacher)
    stream = ImageStream(Layout(root).curated, config.stream, seed)
    # Only this student matters to its run: another one's change must not make it start anew.
    own = {name: config.model_copy(update={"students": {name: kept}}) for name, kept in config.students.items()}
    make = {name: partial(student_job, name, alone, teacher, stream, seed) for name, alone in own.items()}
    models = Layout(root).students
    others = [name for name in config.students if name != student] if config.share_teacher else []
    return train_and_deliver(
        make[student](),
        Delivery(root, models / student, Layout(root).report("distill", student), {"teacher": teacher_weights}),
        [Beside(f"distill/{name}", own[name], models / name, make[name]) for name in others],
    )


def student_job(name: str, config: DistillConfig, teacher: Network, stream: ImageStream, seed: int) -> Job:
    """The training of one student, at its start."""
    shape = config.students[name].backbone.trained_at(config.crops.global_size)
    heads = {head: theirs.config for head, theirs in teacher.heads.items()}
    networks = distillation(draw_network(shape, heads, seed), teacher)
    return Job(f"distill/{name}", config, networks, stream, masking=None, seed=seed)


def check_patch_sizes(config: DistillConfig, teacher: Network) -> None:
    """Raise ConfigError unless all students cut images into patches as the teacher does."""
    theirs = teacher.backbone.config.patch_size
    for name, student in config.students.items():
        if student.backbone.patch_size != theirs:
            raise ConfigError(
                f"distill.students.{name}.backbone.patch_size is {student.backbone.patch_size}, the teacher's is "
                f"{theirs}: patches are compared one to one, so they must be equal"
            )
