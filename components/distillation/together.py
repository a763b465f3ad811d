"""Train students concurrently on the same batches, with one forward pass of the frozen teacher's backbone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from components.core.distributed import rank
from components.core.tracking import StageRun, reporting_to
from components.data.batch import Batch
from components.data.crops import NUM_GLOBAL
from components.model.vit import VisionTransformer, ViTOutput
from components.training.cost import backbone_flops, training_flops
from components.training.delivery import StartedTraining
from components.training.loop import Job, Run, note
from components.training.step import DivergedError

logger = logging.getLogger(__name__)


class Student(Run):
    """The training of one student, which logs to its own tracker run."""

    def __init__(self, started: StartedTraining, tracked: StageRun, flops_per_image: float) -> None:
        """Resume from its newest checkpoint, if there is one.

        Args:
            started: the training.
            tracked: its tracker run.
            flops_per_image: of all students of the group.
        """
        self._tracked = tracked
        with reporting_to(tracked):
            super().__init__(started.job, started.step, started.checkpoints, started.probes, lambda _: flops_per_image)

    def step(self, batch: Batch, step: int, *, together: int = 1) -> None:
        """Take a step as `Run.step` does."""
        with reporting_to(self._tracked):
            super().step(batch, step, together=together)


class StudentGroup:
    """Several students that step on the same batches, driven by the training loop.

    Results equal those of separate trainings. A student whose checkpoint is ahead waits until the others reach its
    step; one that diverges stops, and the others continue.

    Attributes:
        start: steps that all students have done.
        diverged: errors of stopped students, by name.
    """

    def __init__(self, students: Mapping[str, Run]) -> None:
        self.students, self.job = students, next(iter(students.values())).job
        self.name = ", ".join(run.name for run in students.values())
        self.start = min(run.start for run in students.values())
        self.diverged: dict[str, DivergedError] = {}
        self._shared_teacher = SharedTeacher(self.job.networks.teacher.backbone)
        self._checkpoints = ExitStack()

    def waited(self, seconds: float, step: int) -> None:
        """Record how long the step waited for its batch."""
        for run in self._stepping(step).values():
            run.waited(seconds, step)

    def step(self, batch: Batch, step: int) -> None:
        """Take the step with each student.

        Raises:
            DivergedError: all students have diverged; the first one's error.
        """
        stepping = self._stepping(step)
        for number, (student, run) in enumerate(stepping.items()):
            self._shared_teacher.select(first=number == 0, last=number + 1 == len(stepping))
            try:
                run.step(batch, step, together=len(stepping))
            except DivergedError as error:
                self.diverged[student] = error
        if len(self.diverged) == len(self.students):
            raise next(iter(self.diverged.values()))
        for student in stepping.keys() & self.diverged.keys() if rank() == 0 else ():
            logger.error("%s. The others go on", self.diverged[student])

    def save(self, steps_done: int) -> None:
        """Start a checkpoint of each student; a diverged one resumes from before its last step."""
        for run in self._stepping(steps_done - 1).values():
            run.save(steps_done)

    def failed(self) -> bool:
        """Return whether writing a latest checkpoint has failed."""
        return any(run.failed() for run in self.students.values())

    def wait(self) -> None:
        """Wait until the latest checkpoints are complete."""
        for run in self.students.values():
            run.wait()

    def note(self) -> str:
        """Return the last loss of each student, and the speed; empty before the first row."""
        return note([run.rows[-1] for run in self.students.values() if run.rows])

    def __enter__(self) -> object:
        for run in self.students.values():
            self._checkpoints.enter_context(run)
        return self

    def __exit__(self, *raised: object) -> bool | None:
        return self._checkpoints.__exit__(*raised)  # pyright: ignore[reportArgumentType]

    def _stepping(self, step: int) -> dict[str, Run]:
        return {s: run for s, run in self.students.items() if run.start <= step and s not in self.diverged}


class SharedTeacher:
    """Replace a frozen backbone's forward: run it for the first student of a step and reuse the features for others.

    Features are reused rather than logits, because the K logits of every patch of a batch would not fit into memory.
    """

    def __init__(self, backbone: VisionTransformer) -> None:
        self._forward = backbone.forward
        self._features: deque[ViTOutput] = deque()  # by micro-batch, in order
        self._first = self._last = True
        backbone.forward = self  # pyright: ignore[reportAttributeAccessIssue]

    def select(self, *, first: bool, last: bool) -> None:
        """Announce the next student, and whether it is the first or the last one of the step."""
        self._first, self._last = first, last

    def __call__(self, images: Tensor) -> ViTOutput:
        """Return the features of a micro-batch's global crops."""
        features = self._forward(images) if self._first else self._features.popleft()
        if not self._last:
            self._features.append(features)
        return features


def joint_flops(jobs: Sequence[Job]) -> float:
    """Return the `training_flops` of a group whose teacher backbone runs once; its heads run for each student."""
    config, teacher = jobs[0].config, jobs[0].networks.teacher.backbone.config
    shared = NUM_GLOBAL * backbone_flops(teacher, config.crops.global_size)
    return sum(training_flops(job.networks, config.crops, None) for job in jobs) - (len(jobs) - 1) * shared
