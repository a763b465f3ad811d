"""Distill a frozen teacher into students, with the training objective and without masking.

One stage trains all students. A student that an earlier run of the same code trained from the same inputs is taken from
the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from components.core.config import ConfigError
from components.core.distributed import barrier, rank
from components.core.layout import RELATIVE, Layout
from components.core.locks import exclusive
from components.core.references import ModelReference, is_registered
from components.core.registered_weights import download_weights
from components.core.stage_runs import stage_run
from components.core.storage import atomic_dir, sha256_file, write_bytes
from components.core.tracking import StageRun, reporting_to
from components.data.stream import ImageStream
from components.distillation.config import DistillConfig
from components.distillation.together import Student, StudentGroup, joint_flops
from components.model.export import HEADS_FILE
from components.training.checkpoint import agreed, only_trainer
from components.training.delivery import (
    StartedTraining,
    Training,
    copy_report,
    copy_weights,
    describe_training,
    digests,
    drop_checkpoints,
    forget,
    has_results,
    log_report,
    report_results,
)
from components.training.initial import draw_network, load_network
from components.training.loop import Job, train
from components.training.networks import Network, distillation
from components.training.parallelize import launch
from components.training.precision import resolve_precision
from components.training.step import DivergedError

logger = logging.getLogger(__name__)

REPORTS = RELATIVE.report("distill", "students")
CODE = RELATIVE.code_lists / "distill.txt"  # fingerprint of the stage's code, written before the stage runs
REPORTED = "code.txt"  # beside the results of a delivered student: the code that trained it


def run(config: DistillConfig, root: Path, seed: int, name: str) -> dict[str, Any]:
    """Distill the teacher on data/curated into all students; return the figures of each.

    Writes models/students/S and reports/distill/students/S of each student S.

    Args:
        config: the section `distill`.
        root: workspace.
        seed: of order, crops and initial weights.
        name: of the model, which is the tracker's experiment for the students' runs.
    """
    teacher = find_teacher(config.teacher_weights, root)
    return launch(distill, config.num_processes, config, root, seed, name, teacher)


def find_teacher(weights: str, root: Path) -> Path:
    """Return the teacher's weights folder; download a registered version.

    Raises:
        ConfigError: an alias, or weights that were registered without heads.
        TrackingError: the registry does not answer, or has no such version.
    """
    if not is_registered(weights):
        return root / weights
    if (named := ModelReference.of_uri(weights)) and named.alias:
        raise ConfigError(
            f"distill.teacher_weights {weights}: an alias is not an exact version; give models:/NAME/VERSION, or "
            "start the stage by `pedigree run`, which resolves the alias"
        )
    with exclusive(Layout(root).state / "teacher.lock"):  # the ranks of a machine share one download
        folder = download_weights(weights, root)
    if not (folder / HEADS_FILE).is_file():
        raise ConfigError(
            f"distill.teacher_weights {weights}: registered without heads, which students learn from; teachers have "
            "them (NAME or NAME-candidates), students do not (NAME-STUDENT)"
        )
    return folder


def distill(config: DistillConfig, root: Path, seed: int, name: str, teacher_weights: Path) -> dict[str, Any]:
    """Run the stage on one rank."""
    config = resolve_precision(config, "distill")
    teacher = load_network(teacher_weights)
    check_patch_sizes(config, teacher)
    stream, parents = ImageStream(Layout(root).curated, config.stream, seed), digests({"teacher": teacher_weights})
    jobs = {student: student_job(student, config, teacher, stream, seed) for student in config.students}
    trainings = {student: describe_training(job, root, parents) for student, job in jobs.items()}
    with ExitStack() as held:
        for training in sorted(trainings.values(), key=lambda training: training.key):  # fixed order: no deadlock
            held.enter_context(only_trainer(training.folder, training.name))
        pending = {student: jobs.pop(student) for student, training in trainings.items() if not _is_cached(training)}
        _train_missing(pending, trainings, name, share_teacher=config.share_teacher)
        if rank() == 0:
            _deliver(trainings, root)
        figures = {student: training.figures for student, training in trainings.items()}
        barrier()
        for training in trainings.values():
            _mark_delivered(training)
        for training in trainings.values():
            drop_checkpoints(training)
    return figures


def _train_missing(
    pending: dict[str, Job], trainings: Mapping[str, Training], name: str, *, share_teacher: bool
) -> None:
    """Train students, or reuse results of an earlier attempt; each has a tracker run.

    Jobs are popped from `pending`, so that students trained one after another are in memory one at a time.

    Raises:
        DivergedError: a student diverged; the results of the others are stored.
    """
    with ExitStack() as runs:
        ends = {student: runs.enter_context(ExitStack()) for student in pending}
        tracked = {student: end.enter_context(_tracked(trainings[student], name)) for student, end in ends.items()}
        missing = [student for student in pending if not _reuse_results(trainings[student], tracked[student])]
        groups = ([missing] if missing else []) if share_teacher else [[student] for student in missing]
        diverged: dict[str, DivergedError] = {}
        for group in groups:
            diverged |= _train({student: pending.pop(student) for student in group}, trainings, tracked)
        for student in (student for student in ends if student not in diverged):
            _report(trainings[student], tracked[student])
            ends[student].close()
        for error in diverged.values():
            raise error


def _train(
    jobs: Mapping[str, Job], trainings: Mapping[str, Training], tracked: Mapping[str, StageRun]
) -> dict[str, DivergedError]:
    """Train students concurrently and store their results; return the errors of those that diverged."""
    started = {student: StartedTraining(trainings[student], job) for student, job in jobs.items()}
    flops = joint_flops([one.job for one in started.values()])
    together = StudentGroup({student: Student(one, tracked[student], flops) for student, one in started.items()})
    try:
        train(together)
    except DivergedError:  # all students diverged
        return together.diverged
    for student, one in started.items():
        if student not in together.diverged:
            one.store_results()
    return together.diverged


def _tracked(training: Training, name: str) -> AbstractContextManager[StageRun]:
    """Open the student's tracker run, in the experiment `name`."""
    stage, _, student = training.name.partition("/")
    params = {"name": name, "seed": training.provenance["seed"], **training.config.model_dump(mode="json")}
    return stage_run(stage, student, params, training.root)


def _is_cached(training: Training) -> bool:
    """Return whether an earlier run of the same code delivered the student; every rank must call."""
    marker = training.results / REPORTED
    if not agreed(marker.is_file()):
        return False
    if agreed(rank() == 0 and marker.read_text() == _code(training.root)) and has_results(training):
        logger.info("%s: trained by an earlier run from the same inputs; taken from the cache", training.name)
        return True
    if rank() == 0:
        forget(training.root, training.key)
    barrier()
    return False


def _reuse_results(training: Training, tracked: StageRun) -> bool:
    """Return whether an earlier attempt trained the student but did not deliver it; every rank must call."""
    if not has_results(training):
        return False
    logger.info("%s: trained by an earlier try; its results are reused", training.name)
    with reporting_to(tracked):
        report_results(training)
    return True


def _report(training: Training, tracked: StageRun) -> None:
    """Log a trained student's figures and report to its tracker run."""
    if rank() == 0:
        tracked.log_result({key: value for key, value in training.figures.items() if key != "last"})
        with reporting_to(tracked):
            log_report(training)


def _deliver(trainings: Mapping[str, Training], root: Path) -> None:
    """Write all students and their reports atomically; those of removed students are deleted."""
    with atomic_dir(Layout(root).students) as models, atomic_dir(root / REPORTS) as reports:
        for student, training in trainings.items():
            copy_weights(training, models / student)
            copy_report(training, reports / student)


def _mark_delivered(training: Training) -> None:
    """Keep the results of a delivered student for later runs, if the code that trained it is known."""
    if rank() > 0:
        return
    code = _code(training.root)
    if code is None:
        forget(training.root, training.key)
    else:
        write_bytes(training.results / REPORTED, code.encode())


def _code(root: Path) -> str | None:
    """Return the SHA-256 of the list of the stage's code; None if there is no list."""
    return sha256_file(root / CODE) if (root / CODE).is_file() else None


def student_job(name: str, config: DistillConfig, teacher: Network, stream: ImageStream, seed: int) -> Job:
    """Define the training of one student."""
    # The run key covers this student only: a change of another one must not restart it.
    config = config.model_copy(update={"students": {name: config.students[name]}})
    shape = config.students[name].backbone.trained_at(config.crops.global_size)
    heads = {head: theirs.config for head, theirs in teacher.heads.items()}
    networks = distillation(draw_network(shape, heads, seed), teacher)
    return Job(f"distill/{name}", config, networks, stream, masking=None, seed=seed)


def check_patch_sizes(config: DistillConfig, teacher: Network) -> None:
    """Raise ConfigError unless all students have the teacher's patch size."""
    theirs = teacher.backbone.config.patch_size
    for name, student in config.students.items():
        if student.backbone.patch_size != theirs:
            raise ConfigError(
                f"distill.students.{name}.backbone.patch_size is {student.backbone.patch_size}, the teacher's is "
                f"{theirs}: patches are compared one to one, so they must be equal"
            )
