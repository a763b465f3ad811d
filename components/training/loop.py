"""The training loop that pretraining, adaptation and distillation share."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from components.core.config import ConfigError
from components.core.distributed import all_reduce_sum, rank, world_size
from components.core.progress import Advance, progress
from components.data.batch import Batch, BatchPlan, TrainingBatches, iterate_batches
from components.data.config import MaskingConfig
from components.data.stream import ImageStream
from components.training.alerts import Alerts, Watch
from components.training.checkpoint import Checkpoints, Progress
from components.training.config import TrainingConfig
from components.training.cost import CostMeter, accelerator, training_flops
from components.training.divergence import Dump, SkippedSteps
from components.training.loss_table import LOSSES, Row
from components.training.monitors import Instruments, Monitor, Probes
from components.training.networks import Networks
from components.training.parallelize import EXIT_INTERRUPTED, training_device
from components.training.schedules import Schedules
from components.training.step import DivergedError, TrainingStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Definition of one training run."""

    name: str  # stage, and item if it has one
    config: TrainingConfig
    networks: Networks
    stream: ImageStream
    masking: MaskingConfig | None  # None: no masking (distillation)
    seed: int

    def __post_init__(self) -> None:
        # Under torchrun the number of ranks is not in the configuration.
        try:
            self.config.check_ranks("number of ranks", world_size())
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def batch_plan(self) -> BatchPlan:
        """Return the plan that determines this rank's batches."""
        patch_size = self.networks.student.backbone.config.patch_size
        config = self.config
        plan = BatchPlan(self.seed, config.batch_size, patch_size, config.crops, self.masking, rank(), world_size())
        if config.gram is None:
            return plan
        return replace(plan, gram_scale=config.gram.teacher_scale, gram_after_steps=config.gram.after_steps)

    def training_step(self) -> TrainingStep:
        """Prepare the networks for training, with their initial values; call this once."""
        return TrainingStep(self.networks, self.config, self.seed, training_device())


class Steps(AbstractContextManager[object], Protocol):
    """What the loop drives: a `Run`, or several on the same batches. Its context is that of the checkpoints."""

    job: Job  # defines the batches
    name: str
    start: int  # steps done before

    def waited(self, seconds: float, step: int) -> None: ...  # noqa: D102

    def step(self, batch: Batch, step: int) -> None: ...  # noqa: D102

    def save(self, steps_done: int) -> None: ...  # noqa: D102

    def failed(self) -> bool: ...  # noqa: D102

    def wait(self) -> None: ...  # noqa: D102

    def note(self) -> str: ...  # noqa: D102


def train(run: Steps) -> None:
    """Train to the last step.

    Raises:
        DivergedError: more than `max_skipped_steps` had a loss or gradient that is not finite.
        SystemExit: with EXIT_INTERRUPTED after SIGTERM, once the checkpoint is saved.
    """
    config, steps = run.job.config, range(run.start, run.job.config.steps)
    batches = iterate_batches(TrainingBatches(run.job.stream, run.job.batch_plan()), config.stream, steps)
    # The SIGTERM handler stays installed until the last checkpoint is complete. Closing the batches ends the workers at
    # once; otherwise the interpreter would wait for them at exit.
    with _stop_request() as stop_requested, closing(batches), run, _progress(run) as advance:
        for step in steps:
            wait_start = time.monotonic()
            batch = next(batches)
            run.waited(time.monotonic() - wait_start, step)

            run.step(batch, step)
            advance(1, run.note())

            steps_done = step + 1
            stop = _on_any_rank(stop_requested.is_set() or run.failed())
            if stop or steps_done == config.steps or steps_done % config.checkpoint_every_steps == 0:
                run.save(steps_done)
            if stop and steps_done < config.steps:
                run.wait()
                logger.info("%s: stopped after %d steps; start it again to go on", run.name, steps_done)
                raise SystemExit(EXIT_INTERRUPTED)


class Run:
    """A running job: its step, checkpoints and monitor. Every rank must create one.

    Attributes:
        start: steps done at its newest checkpoint.
    """

    def __init__(
        self,
        job: Job,
        training: TrainingStep,
        checkpoints: Checkpoints,
        probes: Probes | None = None,
        flops_per_image: Callable[[int], float] | None = None,
    ) -> None:
        """Resume from the newest checkpoint, if there is one.

        Args:
            job: what is trained.
            training: of the job, with initial values.
            checkpoints: of this run.
            probes: periodic measurements of the EMA.
            flops_per_image: operations per image after a number of steps; None: those of this job alone.
        """
        self.job, self.name, self.training, self.checkpoints = job, job.name, training, checkpoints
        progress, folder = checkpoints.load_newest(training), checkpoints.folder
        self.start = progress.steps_done
        self._schedules = Schedules(job.config)
        alerts = Alerts(folder, self.start, job.name)
        self._skipped = SkippedSteps(job.config.max_skipped_steps, progress.skipped_steps, alerts)
        tools = _instruments(job, alerts, probes or Probes(), flops_per_image or partial(_flops_per_image, job))
        self._monitor = Monitor(folder / LOSSES, job.config, tools, self.start)

    @property
    def rows(self) -> list[Row]:
        """Rows that the monitor wrote."""
        return self._monitor.rows

    def waited(self, seconds: float, step: int) -> None:
        """Record how long the step waited for its batch."""
        if step == self.start:
            self._monitor.start_clock(seconds)
        self._monitor.waited(seconds)

    def step(self, batch: Batch, step: int, *, together: int = 1) -> None:
        """Take and record a step, or skip it if it is not finite; every rank must call.

        Args:
            batch: as loaded.
            step: its number, from 0.
            together: number of runs that share the wall-clock time.

        Raises:
            DivergedError: the step is not finite and no more may be skipped; the message names the dump.
        """
        values, last = self._schedules.at(step), step + 1 == self.job.config.steps
        try:
            output = self.training(batch.normalize(training_device()), step, values)
        except DivergedError as error:
            if not self._skipped.may_skip(error, step):
                raise self._dump(error, step, batch) from None
        else:
            self._monitor.record(output, values, step + 1, last=last, together=together)

    def save(self, steps_done: int) -> None:
        """Start writing a checkpoint."""
        self.checkpoints.save(self.training, Progress(steps_done, self._skipped.count))

    def failed(self) -> bool:
        """Return whether writing the latest checkpoint has failed."""
        return self.checkpoints.failed()

    def wait(self) -> None:
        """Wait until the latest checkpoint is complete."""
        self.checkpoints.wait()

    def note(self) -> str:
        """Return the last loss and speed; empty before the first row."""
        return note(self.rows[-1:])

    def __enter__(self) -> object:
        return self.checkpoints.__enter__()

    def __exit__(self, *raised: object) -> None:
        self.checkpoints.__exit__(*raised)  # pyright: ignore[reportArgumentType]

    def _dump(self, error: DivergedError, step: int, batch: Batch) -> DivergedError:
        """Dump what reproducing the step takes; return the error that ends the run."""
        self.save(step)
        job, first, count = self.job, step * self.job.config.batch_size, self.job.config.batch_size
        dump = Dump(step, job.seed, first, job.stream.image_ids(first, count), error)
        path = dump.write(self.checkpoints.folder, batch)
        return DivergedError(
            f"{job.name}: {error}. {job.config.max_skipped_steps} steps were skipped before (max_skipped_steps). To "
            f"take this step again, start the run again; its batch, image ids and losses are in {path}",
            error.values,
        )


def note(rows: Sequence[Row]) -> str:
    """Return the losses in the last rows of concurrent runs, and their speed; empty if there is no row."""
    losses = [f"{loss:.4f}" for row in rows if (loss := row.get("loss_total")) is not None]  # older rows may lack it
    if not losses:
        return ""
    speed = rows[0].get("images_per_second")
    return f"loss {', '.join(losses)}" + (f", {speed:.1f} images/s" if speed else "")


def _flops_per_image(job: Job, steps_done: int) -> float:
    plan = job.batch_plan()
    gram_active = job.networks.gram_teacher is not None and steps_done > plan.gram_after_steps
    return training_flops(job.networks, job.config.crops, job.masking, plan.gram_scale if gram_active else None)


def _instruments(job: Job, alerts: Alerts, probes: Probes, flops_per_image: Callable[[int], float]) -> Instruments:
    config, networks, device = job.config, job.networks, training_device()
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
    """Yield an event that SIGTERM sets, so that the process can finish and save a step before it exits."""
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
def _progress(run: Steps) -> Iterator[Advance]:
    if rank() > 0:
        yield lambda count=1, note="": None
        return
    with progress(run.name, run.job.config.steps, "steps", start=run.start) as advance:
        yield advance


def _on_any_rank(flag: bool) -> bool:
    """Return whether any rank sets the flag: signals arrive at different steps, but ranks must stop at the same one."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=training_device())))
