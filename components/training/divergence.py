"""Skip, count and report non-finite steps; dump the batch of the one that ends the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from components.core.distributed import barrier, rank
from components.core.storage import write_json
from components.core.tracking import log_metrics
from components.data.batch import Batch
from components.training.alerts import Alert, Alerts
from components.training.step import DivergedError


class SkippedSteps:
    """Counter of skipped steps over the whole run.

    Attributes:
        count: steps skipped so far; part of a checkpoint.
    """

    def __init__(self, limit: int, count: int, alerts: Alerts) -> None:
        self.count = count
        self._limit, self._alerts = limit, alerts

    def may_skip(self, error: DivergedError, step: int) -> bool:
        """Count a skipped step and raise an alert, if the limit allows it; every rank must call."""
        if self.count >= self._limit:
            return False
        self.count += 1
        if rank() == 0:
            log_metrics({"skipped_steps": float(self.count)}, step + 1)
            message = f"{error}. Step skipped, {self.count} of at most {self._limit}"
            self._alerts.add(Alert(step + 1, "not_finite", message))
        return True


@dataclass(frozen=True)
class Dump:
    """What reproducing a non-finite step takes, in addition to the checkpoint before it."""

    step: int
    seed: int
    first_position: int  # of the stream, over all ranks
    image_ids: list[str]  # in the order of positions, over all ranks
    error: DivergedError

    def write(self, folder: Path, batch: Batch) -> Path:
        """Write `folder`/diverged_step_<n> with each rank's loaded batch, losses and norms; every rank must call."""
        path = folder / f"diverged_step_{self.step}"
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"global_crops": batch.global_crops, "local_crops": batch.local_crops}
        optional = {"masks": batch.masks, "gram_crops": batch.gram_crops}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        save_file(tensors, path / f"rank_{rank()}.safetensors")
        values = {name: repr(value) for name, value in self.error.values.items()}  # JSON has no NaN
        write_json(path / f"rank_{rank()}.json", {"values": values})
        if rank() == 0:
            facts: dict[str, Any] = {k: v for k, v in vars(self).items() if k != "error"}
            write_json(path / "dump.json", facts | {"error": str(self.error)})
        barrier()
        return path
