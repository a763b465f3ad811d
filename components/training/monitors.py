"""What a person watches to see whether training goes well: losses, rates, speed, and signs of collapse."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from components.core.distributed import all_reduce_sum, rank, world_size
from components.core.metrics import effective_rank, feature_std
from components.core.tracking import log_metrics
from components.training.schedules import StepValues
from components.training.step import StepOutput

logger = logging.getLogger(__name__)


class Monitor:
    """Writes one row every `every_steps` steps to a CSV file, the log and the tracker.

    Losses are means over the steps and ranks since the last row; the rest are values of the row's own step. Rows after
    `steps_done` are dropped at the start: a resumed run writes them again.
    """

    def __init__(self, path: Path, every_steps: int, batch_size: int, steps_done: int) -> None:
        self._path, self._every, self._batch_size = path, every_steps, batch_size
        self.rows = [row for row in read_rows(path) if row["step"] <= steps_done]
        if rank() == 0:
            _rewrite(path, self.rows)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._since = time.monotonic()

    def waited(self, seconds: float) -> None:
        """Count time in which the step waited for its batch."""
        self._waited += seconds

    @torch.no_grad()
    def record(self, output: StepOutput, values: StepValues, steps_done: int, *, last: bool) -> None:
        """Take note of a step; every rank must call. The last step always has a row."""
        for name, term in output.losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term
        self._steps += 1
        if last or steps_done % self._every == 0:
            self._write(output, values, steps_done)

    def _write(self, output: StepOutput, values: StepValues, steps_done: int) -> None:
        terms = all_reduce_sum(torch.stack(list(self._sums.values()))) / (self._steps * world_size())
        seconds = max(time.monotonic() - self._since, 1e-9)
        features = output.cls_tokens.float().cpu().numpy()
        row = {
            "step": steps_done,
            **dict(zip((f"loss_{name}" for name in self._sums), terms.tolist(), strict=True)),
            "learning_rate": values.lr,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "teacher_temp": values.teacher_temp,
            **{f"grad_norm_{name}": float(norm) for name, norm in output.grad_norms.items()},
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
            "target_entropy": target_entropy(output.teacher_cls_logits, values.teacher_temp),
            "images_per_second": self._steps * self._batch_size / seconds,
            "data_wait_share": self._waited / seconds,
        }
        self._sums, self._steps, self._waited, self._since = {}, 0, 0.0, time.monotonic()
        self.rows.append(row)
        if rank() == 0:
            _append(self._path, row)
            log_metrics({name: value for name, value in row.items() if name != "step"}, steps_done)
            logger.info(
                "step %d: loss %.4f, %.1f images/s, %.0f %% of the time waiting for data",
                steps_done, row["loss_total"], row["images_per_second"], 100 * row["data_wait_share"],
            )  # fmt: skip


def target_entropy(teacher_logits: Tensor, teacher_temp: float) -> float:
    """Mean entropy, in nats, of the teacher's softmax with the batch mean as centre: log K if it says nothing.

    Args:
        teacher_logits: [N, K].
        teacher_temp: positive.
    """
    logits = teacher_logits.float()
    log_probs = torch.log_softmax((logits - logits.mean(dim=0)) / teacher_temp, dim=-1)
    return float(-(log_probs.exp() * log_probs).sum(dim=-1).mean())


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a monitor's file, if there is one; a half-written one is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows if "data_wait_share" in row]


def _rewrite(path: Path, rows: list[dict[str, float]]) -> None:
    path.unlink(missing_ok=True)
    for row in rows:
        _append(path, row)


def _append(path: Path, row: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
