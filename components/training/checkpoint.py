"""Atomic checkpoints with everything that a resumed run needs for bit-identical results.

torch.distributed.checkpoint writes them asynchronously, each rank its shards, and reads them on any number of ranks.
Its own index is a pickle, so that anyone with write access to the bucket could execute code here; therefore its
safetensors writer is used, with a JSON index that holds each file's SHA-256. Checkpoints contain no random state,
because every draw is seeded by (seed, step or position, rank), and no stream position, which is step * batch_size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from components.core.distributed import all_reduce_sum, barrier, is_distributed, rank, world_size
from components.core.layout import TRAINING_LOCK
from components.core.locks import try_record_lock
from components.core.storage import StorageError, write_bytes
from components.training.alerts import FILE as ALERTS
from components.training.checkpoint_store import CheckpointError, LocalStore, S3Store, Store, WholeWriter, read_index
from components.training.config import TrainingConfig
from components.training.loss_table import LOSSES
from components.training.optimizer import moments
from components.training.parallelize import training_device
from components.training.step import TrainingStep

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
WAIT_SECONDS = 0.5
# Settings that change how fast a run goes and what it reports, not what it computes (beyond float rounding).
SPEED_ONLY = {
    "num_processes": True,
    "activation_checkpointing": True,
    "compile": True,
    "sharding": True,
    "checkpoint_uri": True,
    "checkpoint_every_steps": True,
    "log_every_steps": True,
    "max_skipped_steps": True,
    "monitor": True,
    "share_teacher": True,
    "stream": {"num_workers", "max_bad_images", "cache_gib"},
}


def run_key(stage: str, config: TrainingConfig, facts: Mapping[str, Any]) -> str:
    """Return a hash of everything that determines a run: runs with equal keys compute equal weights.

    Args:
        stage: name and item of the stage.
        config: the resolved configuration.
        facts: seed, digests of the dataset and of the initial weights.
    """
    what = {"stage": stage, "config": config.model_dump(mode="json", exclude=SPEED_ONLY), "facts": dict(facts)}  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def only_trainer(folder: Path, name: str) -> Iterator[None]:
    """Hold a run's folder exclusively; wait while another process holds it. Every rank must call.

    The other process may be a concurrent stage that trains the same run, or one that outlived its supervisor.

    Args:
        folder: of the run.
        name: of the job, for the log.
    """
    waiting = False
    with ExitStack() as held:
        # Poll with a collective each time: a rank that blocks in a collective times out after some minutes.
        while not agreed(rank() == 0 and _lock(folder, held)):
            if not waiting:
                logger.info("%s: another process is training this run (`pedigree train-status`); waiting for it", name)
            waiting = True
            time.sleep(WAIT_SECONDS)
        yield
        if rank() == 0 and [path.name for path in folder.glob("*")] == [TRAINING_LOCK]:
            shutil.rmtree(folder, ignore_errors=True)  # empty, unless another process starts just now


def agreed(answer: bool) -> bool:
    """Return rank 0's answer on all ranks; every rank must call."""
    mine = float(answer and rank() == 0)
    return bool(all_reduce_sum(torch.tensor(mine, device=training_device())))


def _lock(folder: Path, held: ExitStack) -> bool:
    with ExitStack() as opened, suppress(FileNotFoundError):  # removed just now
        folder.mkdir(parents=True, exist_ok=True)
        file = opened.enter_context((folder / TRAINING_LOCK).open("w"))
        # A record lock ends with its process, even if forked loader workers live on. The inode differs if the folder
        # was removed meanwhile.
        if try_record_lock(file) and os.fstat(file.fileno()).st_ino == (folder / TRAINING_LOCK).stat().st_ino:
            held.enter_context(opened.pop_all())
            return True
    return False


@dataclass(frozen=True)
class Progress:
    """Progress of a run, as stored in a checkpoint."""

    steps_done: int = 0
    skipped_steps: int = 0  # of those, skipped as not finite


class Checkpoints:
    """The checkpoints of one run. Every rank must create one and call its methods in the same order.

    On exit as a context manager it waits for the checkpoint that is being written.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder  # of the run; its checkpoints are there too, unless `uri` (s3://...) is given
        self._store: Store = LocalStore(folder) if uri is None else S3Store(uri, folder)
        # A separate group, because checkpoints coordinate concurrently with the training's collectives.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if is_distributed() else None
        if self._group is None:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # emitted for every checkpoint
        self._writing: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:
            with suppress(Exception, CheckpointException):  # the exception that ended the run is more important
                self._writing.result()

    def save(self, training: TrainingStep, progress: Progress) -> None:
        """Copy the state, then write it and delete the oldest checkpoint in the background.

        Raises:
            StorageError, CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        step = progress.steps_done
        staging = self._store.staging(step)
        if rank() == 0:
            for left in staging.parent.glob(".step_*"):  # from a killed process
                shutil.rmtree(left, ignore_errors=True)
            staging.mkdir(parents=True)
            _copy_reports(self.folder, staging)  # so that a run resumed elsewhere has all rows
        barrier()
        writer = WholeWriter(self._store, step, asdict(progress))
        writing = async_save(_tensors(training), storage_writer=writer, process_group=self._group)
        self._writing = cast(Future[Any], writing)

    def failed(self) -> bool:
        """Return whether writing the latest checkpoint has failed on this rank; `wait` raises the reason."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the latest checkpoint is complete.

        Raises:
            StorageError, CheckpointError: it could not be written; the previous ones are intact.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:
            first = _first(error)
            if isinstance(first, StorageError):  # it names the object
                raise type(first)(f"checkpoint not written, earlier ones remain: {_line(first)}") from None
            said = f"checkpoint not written to {self.folder}, earlier ones remain: {_line(first)}"
            raise CheckpointError(said) from None

    def newest(self) -> int | None:
        """Return the steps done at the newest checkpoint, None if there is none; every rank must call.

        Raises:
            StorageError: the store does not answer.
        """
        steps = self._on_all(self._store.steps)[0]  # rank 0's answer, for all ranks
        return steps[-1] if steps else None

    def load_newest(self, training: TrainingStep) -> Progress:
        """Load the newest checkpoint and return its progress; change nothing if there is none.

        Raises:
            CheckpointError: the newest checkpoint is damaged or has networks of another shape.
            StorageError: the store does not answer.
        """
        newest = self.newest()
        if newest is None:
            return Progress()
        where = self._store.describe(newest)
        try:
            found = self._on_all(lambda: (socket.gethostname(), self._store.fetch(newest)))
            path = next(path for host, path in found if path is not None and host == socket.gethostname())
            state = _tensors(training)
            self._on_all(lambda: _check_networks(state, path))
            load(state, storage_reader=HuggingFaceStorageReader(str(path)), process_group=self._group)
            progress = Progress(**read_index(path)[0])
        except CheckpointException as error:
            raise _unreadable(where, _first(error)) from None
        except (CheckpointError, SafetensorError, TypeError) as error:
            raise _unreadable(where, error) from None
        if rank() == 0:  # local reports may be older than the checkpoint
            _copy_reports(path, self.folder)
        barrier()
        self._store.release(path)
        logger.info("resumed after %d steps from %s", progress.steps_done, where)
        return progress

    def remove(self) -> None:
        """Delete all checkpoints and the folder of the run, once its outputs are stored."""
        self._store.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _on_all(self, act: Callable[[], _T]) -> list[_T]:
        """Return the results of `act` of all ranks; raise an error of any rank on all, so that no rank waits."""
        mine: tuple[_T | None, Exception | None]
        try:
            mine = act(), None
        except (CheckpointError, SafetensorError, StorageError, OSError) as error:
            mine = None, error
        answers = [mine] * world_size()
        if self._group is not None:
            dist.all_gather_object(answers, mine, self._group)
        for _, error in answers:
            if error is not None:
                raise error
        return [cast(_T, answer) for answer, _ in answers]


def _copy_reports(source: Path, target: Path) -> None:
    for name in (LOSSES, ALERTS):
        with suppress(FileNotFoundError):
            write_bytes(target / name, (source / name).read_bytes())


def _tensors(training: TrainingStep) -> dict[str, Tensor]:
    """Return all tensors that change in a run, by name, without copies. The run key covers a frozen teacher."""
    networks = training.networks
    modules = {"student": networks.student, "ema": networks.ema, "objective": training.objective}
    if networks.gram_teacher is not None:
        modules["gram_teacher"] = networks.gram_teacher
    tensors = {
        f"{prefix}/{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()
    }
    for name, parameter in networks.student.named_parameters():
        if parameter.requires_grad:
            for key, value in moments(training.optimizer, parameter).items():
                tensors[f"optimizer/{key}/{name}"] = value
    return tensors


def _check_networks(state: Mapping[str, Tensor], path: Path) -> None:
    there = {
        name: tuple(cast(TensorStorageMetadata, entry).size)
        for name, entry in HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items()
    }
    here = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            shapes = [list(found[name]) if name in found else "missing" for found in (there, here)]
            raise CheckpointError(f"of another model: {name} is {shapes[0]} there, {shapes[1]} in this run")


def _unreadable(where: str, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{where}: cannot be read ({_line(error)}); remove it to go on from the one before")


def _first(error: CheckpointException) -> BaseException:
    """Return the error of the lowest failed rank."""
    return error.failures[min(error.failures)][0]


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
