"""Checkpoints: everything that a resumed run needs to end in the same bits, whole or not at all.

Tensors are in safetensors, the rest in JSON: nothing is pickled. Random state is not among it, because every draw is
seeded by (seed, step or position, rank); nor is the stream's position, which is step * batch_size.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.core.distributed import barrier, rank
from components.core.storage import atomic_dir, write_json
from components.training.config import TrainingConfig
from components.training.step import TrainingStep

logger = logging.getLogger(__name__)

KEEP = 2  # the newest, and the one before in case the newest was written by a machine that was failing
TENSORS, STATE = "state.safetensors", "state.json"
# Settings that change how fast a run goes and what it reports, not what it computes (beyond float rounding).
SPEED_ONLY = {
    "num_processes": True,
    "checkpoint_every_steps": True,
    "log_every_steps": True,
    "max_skipped_steps": True,
    "stream": {"num_workers", "max_bad_images"},
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the message names the folder to remove."""


def run_key(stage: str, config: TrainingConfig, facts: Mapping[str, Any]) -> str:
    """Hash of all that determines a run: two runs with equal keys compute the same weights.

    Args:
        stage: name and item of the stage.
        config: the resolved configuration.
        facts: what lies outside of it: seed, digests of the dataset and of the weights it starts from.
    """
    what = {"stage": stage, "config": config.model_dump(mode="json", exclude=SPEED_ONLY), "facts": dict(facts)}  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that a process that outlived its supervisor and its successor do not both write there.

    Raises:
        CheckpointError: another process trains the same run.
    """
    if rank() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            # A record lock ends with its process, whatever its loader's workers, which are forks of it, still do.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is training this very run; wait for it, or end it and start again"
            ) from None
        yield


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    steps_done: int = 0
    skipped_steps: int = 0  # of those, left out because they were not finite


class Checkpoints:
    """The checkpoints of one run, in `folder`/step_<n>, where n steps have been taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, training: TrainingStep, progress: Progress) -> None:
        """Write one checkpoint from rank 0 and drop the oldest; every rank must call, and waits until it stands."""
        if rank() == 0:
            with atomic_dir(self.folder / f"step_{progress.steps_done}") as aside:
                save_file(_tensors(training), aside / TENSORS)
                write_json(aside / STATE, asdict(progress))
            for old in self._steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step_{old}")
            logger.info("checkpoint after %d steps", progress.steps_done)
        barrier()

    def load_newest(self, training: TrainingStep) -> Progress:
        """Set the state of the newest checkpoint, and return how far it had come; nothing done if there is none.

        Raises:
            CheckpointError: the newest checkpoint is damaged or belongs to networks of another shape.
        """
        steps = self._steps()
        if not steps:
            return Progress()
        path = self.folder / f"step_{steps[-1]}"
        try:
            _set_tensors(training, load_file(path / TENSORS))
            progress = Progress(**json.loads((path / STATE).read_text()))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path}: cannot be read ({reason}); remove this folder to go on from the one before"
            ) from None
        logger.info("resumed after %d steps from %s", progress.steps_done, path)
        return progress

    def remove(self) -> None:
        """Delete all checkpoints of the run: its outputs stand."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.glob("step_*")] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def _modules(training: TrainingStep) -> dict[str, torch.nn.Module]:
    """What changes in a run. A frozen teacher does not: its digest is in the run's key."""
    networks = training.networks
    return {"student": networks.student, "ema": networks.ema, "objective": training.objective}


def _tensors(training: TrainingStep) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}/{name}": tensor
        for prefix, module in _modules(training).items()
        for name, tensor in module.state_dict().items()
    }
    for name, parameter in training.networks.student.named_parameters():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _set_tensors(training: TrainingStep, tensors: Mapping[str, Tensor]) -> None:
    for prefix, module in _modules(training).items():
        start = f"{prefix}/"
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    parameters = dict(training.networks.student.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, part, name = key.split("/", 2)
            training.optimizer.state[parameters[name]][part] = tensor.to(parameters[name].device)
