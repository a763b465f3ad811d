"""The training loop that pretraining, adaptation and distillation share, from its first step to its outputs."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from components.core.distributed import all_reduce_sum, rank, world_size
from components.core.progress import progress
from components.data.batch import Batch, BatchPlan, TrainingBatches, iterate_batches
from components.data.config import MaskingConfig
from components.data.stream import ImageStream
from components.training.alerts import Alerts, Watch
from components.training.checkpoint import Checkpoints, Progress
from components.training.config import TrainingConfig
from components.training.cost import CostMeter, accelerator, training_flops
from components.training.divergence import Dump, SkippedSteps, unchanged_if_diverged
from components.training.loss_table import Row
from components.training.monitors import Instruments, Monitor, Probes
from components.training.networks import Networks
from components.training.parallelize import EXIT_INTERRUPTED, training_device
from components.training.schedules import Schedules
from components.training.step import DivergedError, TrainingStep

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
        self.config.check_ranks("number of ranks", world_size())

    def batch_plan(self) -> BatchPlan:
        """What determines this rank's batches."""
        patch_size = self.networks.student.backbone.config.patch_size
        config = self.config
        return BatchPlan(self.seed, config.batch_size, patch_size, config.crops, self.masking, rank(), world_size())


def train(job: Job, checkpoints: Checkpoints, probes: Probes | None = None) -> list[Row]:
    """Train to the last step, from the newest checkpoint if there is one; return the monitor's rows.

    Args:
        job: what to train.
        checkpoints: of this run.
        probes: look at the average now and then.

    Raises:
        DivergedError: more than `max_skipped_steps` had a loss or gradient that is not finite.
        SystemExit: with EXIT_INTERRUPTED after SIGTERM, once a checkpoint is saved.
    """
    config, device = job.config, training_device()
    batches = TrainingBatches(job.stream, job.batch_plan())
    training = TrainingStep(job.networks.to(device), config, job.seed, device)
    schedules = Schedules(config)
    start = checkpoints.load_newest(training)
    alerts = Alerts(checkpoints.folder)
    skipped = SkippedSteps(config.max_skipped_steps, start.skipped_steps, alerts)
    tools = _instruments(job, alerts, device, probes or Probes())
    monitor = Monitor(checkpoints.folder / "loss.csv", config, tools, start.steps_done)
    coming = iterate_batches(batches, config.stream, range(start.steps_done, config.steps))

    # Closing ends the workers at once; left to the interpreter's exit, they would be waited for after a stop.
    with closing(coming), checkpoints, _stop_request() as stop_requested, _progress(job, start.steps_done) as advance:
        for step in range(start.steps_done, config.steps):
            asked = time.monotonic()
            batch = next(coming)
            monitor.waited(time.monotonic() - asked)

            values, steps_done = schedules.at(step), step + 1
            try:
                with unchanged_if_diverged(training):
                    output = training(batch.normalize(device), step, values)
                monitor.record(output, values, steps_done, last=steps_done == config.steps)
            except DivergedError as error:
                if not skipped.may_skip(error, step):
                    checkpoints.save(training, Progress(step, skipped.count))
                    raise _diverged(job, error, step, batch, checkpoints.folder) from None
            advance(config.batch_size)

            stop = _on_any_rank(stop_requested.is_set() or checkpoints.failed(), device)
            if stop or steps_done % config.checkpoint_every_steps == 0 or steps_done == config.steps:
                checkpoints.save(training, Progress(steps_done, skipped.count))
            if stop and steps_done < config.steps:
                checkpoints.wait()
                logger.info("%s: stopped after %d steps; start it again to go on", job.name, steps_done)
                raise SystemExit(EXIT_INTERRUPTED)
    return monitor.rows


def _instruments(job: Job, alerts: Alerts, device: torch.device, probes: Probes) -> Instruments:
    config, networks = job.config, job.networks
    limits, known = config.monitor.alerts, accelerator(device)
    after_steps = config.optimizer.warmup_steps if limits.after_steps is None else limits.after_steps
    return Instruments(
        Watch(alerts, limits, after_steps, math.log(networks.teacher.dino_head.config.num_prototypes)),
        CostMeter(device, world_size(), config.monitor.energy),
        training_flops(networks, config.crops, job.masking),
        known.flops if known else None,
        probes,
    )


def _diverged(job: Job, error: DivergedError, step: int, batch: Batch, folder: Path) -> DivergedError:
    """Write down what the step needs to be taken again; return the error that ends the run."""
    first, count = step * job.config.batch_size, job.config.batch_size
    path = Dump(step, job.seed, first, job.stream.image_ids(first, count), error).write(folder, batch)
    return DivergedError(
        f"{error}. {job.config.max_skipped_steps} steps were skipped before (max_skipped_steps). To take this step "
        f"again, start the run again; its batch, image ids and losses are in {path}",
        error.values,
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
def _progress(job: Job, steps_done: int) -> Iterator[Callable[[int], None]]:
    if rank() > 0:
        yield lambda count: None
        return
    size = job.config.batch_size
    with progress(job.name, job.config.steps * size, start=steps_done * size) as advance:
        yield advance


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes: signals reach ranks at different steps, and all must stop at the same one."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)))
