"""Monitor a training: losses, schedules, speed, cost and signs of collapse."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from components.core.distributed import all_reduce_sum, rank, world_size
from components.core.metrics import effective_rank, feature_std
from components.core.tracking import log_metrics
from components.training.alerts import Watch
from components.training.config import TrainingConfig
from components.training.cost import CostMeter
from components.training.loss_table import Row, append_row, read_rows, write_rows
from components.training.schedules import StepValues
from components.training.step import StepOutput


@dataclass(frozen=True)
class Probes:
    """Periodic measurements of the EMA, as configured; every rank calls them."""

    knn: Callable[[], float] | None = None
    picture: Callable[[int], None] | None = None  # called with the steps done


@dataclass(frozen=True)
class Instruments:
    """Inputs of the monitor beside the step's output.

    Attributes:
        watch: raises alerts.
        cost: of the run so far.
        flops_per_image: floating-point operations by formula, given the steps done.
        peak_flops: of this rank's device per second, if known.
        probes: of the EMA.
    """

    watch: Watch
    cost: CostMeter
    flops_per_image: Callable[[int], float]
    peak_flops: float | None
    probes: Probes


class Monitor:
    """Write one row every `log_every_steps` steps to a CSV file and the tracker.

    Losses are means over ranks and over the steps since the last row; other values are of the row's own step, averaged
    over ranks unless stated otherwise. Rows after `steps_done` are dropped at the start: a resumed run repeats them.
    Earlier rows are logged to the tracker, whose run is new in this process.
    """

    def __init__(self, path: Path, config: TrainingConfig, instruments: Instruments, steps_done: int) -> None:
        self._path, self._config, self._instruments, self._probes = path, config, instruments, instruments.probes
        self.rows = [row for row in read_rows(path) if (row["step"] or 0) <= steps_done]
        self._seconds = 3600 * ((self.rows[-1].get("hours") if self.rows else None) or 0.0)
        if rank() == 0:
            write_rows(path, self.rows)
            report_rows(self.rows)
        self._sums: dict[str, Tensor] = {}
        self._steps, self._together = 0, 1
        self._waited = 0.0
        self._since = time.monotonic()

    def start_clock(self, ago: float) -> None:
        """Start the clock of the first step, `ago` seconds in the past."""
        self._since = time.monotonic() - ago

    def waited(self, seconds: float) -> None:
        """Record how long the step waited for its batch."""
        self._waited += seconds

    @torch.no_grad()
    def record(self, output: StepOutput, values: StepValues, steps_done: int, *, last: bool, together: int = 1) -> None:
        """Record a step; every rank must call. The last step always has a row.

        If `together` trainings take the step concurrently, each counts an equal part of the time as its cost.
        """
        self._together = together
        for name, term in output.losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term
        self._steps += 1
        knn, every, picture = self._config.monitor.knn, self._config.monitor.pictures_every_steps, self._probes.picture
        measure = knn is not None and (last or steps_done % knn.every_steps == 0)
        if last or measure or steps_done % self._config.log_every_steps == 0:
            self._write(output, values, steps_done, measure=measure)
        if picture and every and steps_done % every == 0:
            picture(steps_done)

    def _write(self, output: StepOutput, values: StepValues, steps_done: int, *, measure: bool) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        waited = self._waited / seconds
        knn = self._probes.knn
        row: Row = {
            "step": steps_done,
            **self._losses(),
            "learning_rate": values.lr,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "teacher_temp": values.teacher_temp,
            **{f"grad_norm_{name}": float(norm) for name, norm in output.grad_norms.items()},
            **self._signs_of_collapse(output, values, steps_done, waited),
            "knn_top1": knn() if knn and measure else None,
            **self._speed(seconds, steps_done),
        }
        # The kNN probe counts for the run's hours, but not for the training speed.
        self._seconds += (time.monotonic() - self._since) / self._together
        row |= {"hours": self._seconds / 3600, **self._instruments.cost.so_far(self._seconds)}
        self._sums, self._steps, self._waited, self._since = {}, 0, 0.0, time.monotonic()
        self._add(row)

    def _losses(self) -> Row:
        means = all_reduce_sum(torch.stack(list(self._sums.values()))) / (self._steps * world_size())
        return dict(zip((f"loss_{name}" for name in self._sums), means.tolist(), strict=True))

    def _signs_of_collapse(self, output: StepOutput, values: StepValues, steps_done: int, waited: float) -> Row:
        features = output.cls_tokens.float().cpu().numpy()
        targets = describe_targets(output.teacher_cls_logits, values.teacher_temp)
        own = {
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
            "cls_patch_cosine": float(output.cls_patch_cosine),
            "target_entropy": targets.entropy,
            "data_wait_share": waited,
        }
        by_rank = _of_ranks(own, output.cls_tokens.device)
        if rank() == 0:
            self._instruments.watch.check(steps_done, by_rank)
        means = {name: sum(numbers) / len(numbers) for name, numbers in by_rank.items()}
        return {**means, "prototypes_used": targets.used, "prototype_perplexity": targets.perplexity}

    def _speed(self, seconds: float, steps_done: int) -> Row:
        rate = self._steps * self._config.batch_size / seconds
        tools, device = self._instruments, self._sums["total"].device
        peak = tools.peak_flops if self._config.bfloat16 else None  # it is of bfloat16
        peaks = _of_ranks({"gib": _peak_memory_gib(device)}, device)["gib"]
        return {
            "images_per_second": rate,
            "mfu": rate * tools.flops_per_image(steps_done) / (world_size() * peak) if peak else None,
            "peak_memory_gib": max(peaks),
        }

    def _add(self, row: Row) -> None:
        if rank() == 0:
            if self.rows and self.rows[-1].keys() != row.keys():  # written by an older version
                self.rows = [dict.fromkeys(row) | {k: v for k, v in old.items() if k in row} for old in self.rows]
                write_rows(self._path, self.rows)
            append_row(self._path, row)
            report_rows([row])
        self.rows.append(row)


def report_rows(rows: Sequence[Row]) -> None:
    """Log rows to the tracker."""
    for row in rows:
        log_metrics({k: value for k, value in row.items() if k != "step" and value is not None}, int(row["step"] or 0))


@dataclass(frozen=True)
class TargetFigures:
    """Statistics of the teacher's targets.

    Attributes:
        entropy: mean over this rank's crops, in nats; log K for uniform targets.
        used: share of the K prototypes that are the argmax of some crop of any rank; at most crops / K.
        perplexity: exp of the entropy of the mean target of all ranks, 1 to K; 1 if all crops have the same prototype.
    """

    entropy: float
    used: float
    perplexity: float


def describe_targets(teacher_logits: Tensor, teacher_temp: float) -> TargetFigures:
    """Compute statistics of the teacher's softmax, centered by the mean of the rank's crops; every rank must call.

    Args:
        teacher_logits: [N, K].
        teacher_temp: positive.
    """
    logits = teacher_logits.float()
    log_probs = torch.log_softmax((logits - logits.mean(dim=0)) / teacher_temp, dim=-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(dim=-1).mean()
    chosen = torch.zeros(logits.shape[1], device=logits.device)
    chosen[probs.argmax(dim=1)] = 1.0
    chosen, mean = all_reduce_sum(torch.stack([chosen, probs.mean(dim=0) / world_size()]))
    spread = -torch.xlogy(mean, mean).sum()
    return TargetFigures(float(entropy), float((chosen > 0).float().mean()), float(spread.exp()))


def _of_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, list[float]]:
    """Gather each value from every rank, in rank order; every rank must call."""
    table = torch.zeros(world_size(), len(values), device=device)
    table[rank()] = torch.tensor(list(values.values()))
    return dict(zip(values, all_reduce_sum(table).T.tolist(), strict=True))


def _peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: allocated GPU memory, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
