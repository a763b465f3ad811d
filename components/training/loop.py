"""The training loop that pretraining, adaptation and distillation share, from its first step to its outputs."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, cast

import torch

from components.core.config import ConfigError
from components.core.distributed import all_reduce_sum, rank, world_size
from components.core.progress import Advance, progress
from components.core.tracking import untracked
from components.data.batch import Batch, BatchPlan, TrainingBatches, iterate_batches
from components.data.config import MaskingConfig
from components.data.stream import ImageStream
from components.training.alerts import Alerts, Watch
from components.training.checkpoint import Checkpoints, Progress
from components.training.config import TrainingConfig
from components.training.cost import CostMeter, accelerator, joint_flops
from components.training.divergence import Dump, SkippedSteps
from components.training.loss_table import LOSSES, Row
from components.training.monitors import Instruments, Monitor, Probes
from components.training.networks import Networks
from components.training.parallelize import EXIT_INTERRUPTED, training_device
from components.training.schedules import Schedules, StepValues
from components.training.step import DivergedError, StepOutput, TrainingStep, take_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One training run. `networks` are as at its start, and as trained after it."""

    name: str  # stage, and item if it has one
    config: TrainingConfig
    networks: Networks
    stream: ImageStream
    masking: MaskingConfig | None  # None: the student sees everything (distillation)
    seed: int

    def __post_init__(self) -> None:
        # Under torchrun the number of ranks is nowhere in the configuration.
        try:
            self.config.check_ranks("number of ranks", world_size())
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def batch_plan(self) -> BatchPlan:
        """What determines this rank's batches."""
        patch_size = self.networks.student.backbone.config.patch_size
        config = self.config
        plan = BatchPlan(self.seed, config.batch_size, patch_size, config.crops, self.masking, rank(), world_size())
        if config.gram is None:
            return plan
        return replace(plan, anchor_scale=config.gram.teacher_scale, anchored_from=config.gram.after_steps)


@dataclass(frozen=True)
class Trainee:
    """A job with what is its own while it is trained.

    Attributes:
        checkpoints: of this run.
        probes: look at the average now and then.
        tracked: whether the tracker's open run is this job's.
    """

    job: Job
    checkpoints: Checkpoints
    probes: Probes
    tracked: bool = True


def train(job: Job, checkpoints: Checkpoints, probes: Probes | None = None) -> list[Row]:
    """Train one job to the last step, from its newest checkpoint if there is one; return the monitor's rows.

    Raises:
        DivergedError, SystemExit: as `train_together`.
    """
    (rows,) = train_together([Trainee(job, checkpoints, probes or Probes())])
    assert rows is not None  # it would have raised
    return rows


def train_together(trainees: Sequence[Trainee]) -> list[list[Row] | None]:
    """Train jobs that differ only in their students to the last step, in lock-step.

    The first is the one that is wanted: another one that diverges stops where it is, and the rest go on. Each goes on
    from its own newest checkpoint; one that is ahead takes no step until the rest are where it is.

    Returns:
        For each the monitor's rows; None of one that diverged.

    Raises:
        DivergedError: more than `max_skipped_steps` of the first had a loss or gradient that is not finite.
        SystemExit: with EXIT_INTERRUPTED after SIGTERM, once all checkpoints are saved.
    """
    job, config, device = trainees[0].job, trainees[0].job.config, training_device()
    plan, together = job.batch_plan(), [trainee.job.networks for trainee in trainees]
    runs = [_Run(trainee, device, partial(_flops_per_image, together, job)) for trainee in trainees]
    schedules, start = Schedules(config), min(run.start for run in runs)
    coming = iterate_batches(TrainingBatches(job.stream, plan), config.stream, range(start, config.steps))

    with ExitStack() as stack:
        stop_requested = stack.enter_context(_stop_request())  # to the end: the last checkpoint must stand, too
        # Closing ends the workers at once; left to the interpreter's exit, they would be waited for after a stop.
        stack.enter_context(closing(coming))
        for run in runs:
            stack.enter_context(run.checkpoints)
        advance = stack.enter_context(_progress(_names(runs), config, start))
        for step in range(start, config.steps):
            stepping = [run for run in runs if run.start <= step and run.diverged is None]
            asked = time.monotonic()
            batch = next(coming)
            for run in stepping:
                run.waited(time.monotonic() - asked, step)

            if stepping:  # nobody, where one that was behind diverged before the others are where it was
                _step(stepping, batch, step, schedules.at(step), device)
            advance(1, _last_row(runs))

            steps_done = step + 1
            failed = any(run.checkpoints.failed() for run in runs)
            stop = _on_any_rank(stop_requested.is_set() or failed, device)
            last = steps_done == config.steps
            if stop or last or steps_done % config.checkpoint_every_steps == 0:
                for run in stepping:
                    if run.diverged is None:  # else its checkpoint from before this step is the one to go on from
                        run.save(steps_done)
            if stop and not last:
                _stop(runs, steps_done)
    return [run.rows if run.diverged is None else None for run in runs]


class _Run:
    """A job in training.

    Attributes:
        start: steps done before; from there on it takes part.
        diverged: why it takes no further step.
    """

    def __init__(self, trainee: Trainee, device: torch.device, flops_per_image: Callable[[int], float]) -> None:
        self.trainee, self.job, self.checkpoints = trainee, trainee.job, trainee.checkpoints
        config, folder = self.job.config, self.checkpoints.folder
        self.training = TrainingStep(self.job.networks, config, self.job.seed, device)
        progress = self.checkpoints.load_newest(self.training)
        self.start, self.diverged = progress.steps_done, cast(DivergedError | None, None)
        with self._tracker():
            alerts = Alerts(folder, self.start, self.job.name)
            self._skipped = SkippedSteps(config.max_skipped_steps, progress.skipped_steps, alerts)
            tools = _instruments(self.job, alerts, device, trainee.probes, flops_per_image)
            self._monitor = Monitor(folder / LOSSES, config, tools, self.start)

    @property
    def rows(self) -> list[Row]:
        """What the monitor wrote."""
        return self._monitor.rows

    def waited(self, seconds: float, step: int) -> None:
        """Count time in which the step waited for its batch."""
        if step == self.start:
            self._monitor.start_clock(seconds)
        self._monitor.waited(seconds)

    def record(
        self, outcome: StepOutput | DivergedError, values: StepValues, steps_done: int, *, together: int
    ) -> None:
        """Take note of a step, or of why it was not taken; every rank must call."""
        with self._tracker():
            if isinstance(outcome, StepOutput):
                last = steps_done == self.job.config.steps
                self._monitor.record(outcome, values, steps_done, last=last, together=together)
            elif not self._skipped.may_skip(outcome, steps_done - 1):
                self.diverged = outcome

    def save(self, steps_done: int) -> None:
        """Begin a checkpoint."""
        self.checkpoints.save(self.training, Progress(steps_done, self._skipped.count))

    def dump(self, error: DivergedError, step: int, batch: Batch) -> DivergedError:
        """Write down what the step needs to be taken again; return the error that ends the run."""
        self.save(step)
        job, first, count = self.job, step * self.job.config.batch_size, self.job.config.batch_size
        path = Dump(step, job.seed, first, job.stream.image_ids(first, count), error).write(
            self.checkpoints.folder, batch
        )
        return DivergedError(
            f"{job.name}: {error}. {job.config.max_skipped_steps} steps were skipped before (max_skipped_steps). To "
            f"take this step again, start the run again; its batch, image ids and losses are in {path}",
            error.values,
        )

    def _tracker(self) -> AbstractContextManager[None]:
        return nullcontext() if self.trainee.tracked else untracked()


def _step(stepping: Sequence[_Run], batch: Batch, step: int, values: StepValues, device: torch.device) -> None:
    """Take a step, and write it down for those that diverged in it.

    Raises:
        DivergedError: the wanted one is among them.
    """
    outcomes = take_step([run.training for run in stepping], batch.normalize(device), step, values)
    for run, outcome in zip(stepping, outcomes, strict=True):
        run.record(outcome, values, step + 1, together=len(stepping))
    for run in stepping:
        if run.diverged is not None:
            error = run.dump(run.diverged, step, batch)
            if run.trainee.tracked:
                for other in stepping:
                    if other.diverged is None:
                        other.save(step + 1)
                raise error from None
            if rank() == 0:
                logger.error("%s. The others go on", error)


def _stop(runs: Sequence[_Run], steps_done: int) -> NoReturn:
    """End the process, once what is being saved stands."""
    for run in runs:
        run.checkpoints.wait()
    logger.info("%s: stopped after %d steps; start it again to go on", _names(runs), steps_done)
    raise SystemExit(EXIT_INTERRUPTED)


def _names(runs: Sequence[_Run]) -> str:
    return ", ".join(run.job.name for run in runs)


def _flops_per_image(together: Sequence[Networks], job: Job, steps_done: int) -> float:
    plan = job.batch_plan()
    anchored = job.networks.anchor is not None and steps_done > plan.anchored_from
    return joint_flops(together, job.config.crops, job.masking, plan.anchor_scale if anchored else None)


def _instruments(
    job: Job, alerts: Alerts, device: torch.device, probes: Probes, flops_per_image: Callable[[int], float]
) -> Instruments:
    config, networks = job.config, job.networks
    limits, known = config.monitor.alerts, accelerator(device)
    after_steps = config.optimizer.warmup_steps if limits.after_steps is None else limits.after_steps
    return Instruments(
        Watch(alerts, limits, after_steps, math.log(networks.teacher.dino_head.config.num_prototypes)),
        CostMeter(device, world_size(), config.monitor.energy),
        flops_per_image,
        known.flops if known else None,
        probes,
    )


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a step is finished and saved before the process ends."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield requested
        return
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(name: str, config: TrainingConfig, steps_done: int) -> Iterator[Advance]:
    if rank() > 0:
        yield lambda count=1, note="": None
        return
    with progress(name, config.steps, "steps", start=steps_done) as advance:
        yield advance


def _last_row(runs: Sequence[_Run]) -> str:
    """Loss of each training and speed, as last measured; empty before."""
    rows = [run.rows[-1] for run in runs if run.rows]  # the older of a resumed run may lack a column
    losses = [f"{loss:.4f}" for row in rows if (loss := row.get("loss_total")) is not None]
    if not losses:
        return ""
    speed = rows[0].get("images_per_second")
    return f"loss {', '.join(losses)}" + (f", {speed:.1f} images/s" if speed else "")


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes: signals reach ranks at different steps, and all must stop at the same one."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)))
