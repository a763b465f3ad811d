"""Several processes as one trainer: starting them, joining them, and wrapping the student."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from components.core.distributed import is_distributed

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; start it again and it goes on


class RankError(RuntimeError):
    """A rank failed; the message is the rank's own."""


def launch(stage: Callable[..., dict[str, Any]], num_processes: int, *args: Any) -> dict[str, Any]:
    """Run `stage(*args)` in one process or several, and return what it returns on rank 0.

    Under torchrun (RANK is set) this process is one rank among those that torchrun started. Otherwise several
    processes are started as `torchrun --standalone` starts them.

    Args:
        stage: a function of a module, which can be found again in a new process.
        num_processes: how many processes to start on this machine; under torchrun its own number counts.
        args: arguments that can be pickled.

    Raises:
        RankError: a started rank failed.
        SystemExit: with EXIT_INTERRUPTED, where the ranks were asked to stop and have saved a checkpoint.
    """
    if "RANK" in os.environ:
        return _as_rank(stage, *args)
    if num_processes == 1:
        return stage(*args)
    return _start_ranks(stage, num_processes, *args)


def training_device() -> torch.device:
    """This rank's GPU where there is one, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def parallelize(student: nn.Module, device: torch.device) -> nn.Module:
    """The student itself in one process; in several, wrapped so that gradients are averaged over ranks."""
    if not is_distributed():
        return student
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)


def _start_ranks(stage: Callable[..., dict[str, Any]], num_processes: int, *args: Any) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    level = logging.getLogger().getEffectiveLevel()
    for name in ("torch.distributed.elastic", "torch.multiprocessing", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what a rank raised is raised below, in one line
    try:
        return elastic_launch(config, _started_rank)(level, num_processes, stage, *args)[0]
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode == EXIT_INTERRUPTED:
            raise SystemExit(EXIT_INTERRUPTED) from None
        # torch hands over what the rank raised as a mapping, and what killed it as text.
        message: Any = failure.message
        reason = message["message"] if isinstance(message, dict) else message
        raise RankError(f"rank {number} of {num_processes}: {str(reason).strip().splitlines()[0]}") from None
    except SignalException as error:
        raise SystemExit(EXIT_INTERRUPTED if error.sigval == signal.SIGTERM else 128 + error.sigval) from None


def _started_rank(level: int, num_processes: int, stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    first = os.environ["RANK"] == "0"
    logging.basicConfig(level=level if first else logging.WARNING, format="%(message)s")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    return _as_rank(stage, *args)


def _as_rank(stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return stage(*args)
    finally:
        dist.destroy_process_group()
