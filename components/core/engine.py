"""Shard-parallel work: one function mapped over shards by joblib, in order, with progress."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from components.core.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


class EngineError(RuntimeError):
    """A worker process that died without an error of its own, such as one the system killed for its memory."""


def map_shards(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None,
    what: str,
    unit: str = "shards",
) -> list[Result]:
    """Results of `function(item)` in the order of `items`, whichever worker finished first.

    Args:
        function: picklable, and independent of the other items: a killed run may call it again.
        items: one for each shard; what they hold is sent to the workers, so send paths rather than pixels.
        workers: processes; 1 runs in this process, None takes one for each CPU that this process may use.
        what: named in the progress display, for example "embedding".
        unit: what one item is.

    Raises:
        EngineError: a worker died. Errors raised by `function` come through as they are.
    """
    num_workers = min(workers or len(os.sched_getaffinity(0)), max(len(items), 1))
    if num_workers == 1:
        return [function(item) for item in track(items, what, len(items), unit)]
    # One shard a task, whatever joblib's annotation of batch_size says; results come in order while others still run.
    options: dict[str, Any] = {"batch_size": 1, "return_as": "generator", "pre_dispatch": "2*n_jobs"}
    options |= {"initializer": _end_with, "initargs": (os.getpid(),)}
    pool: Any = Parallel(n_jobs=num_workers, backend="loky", **options)
    try:
        return list(track(pool(delayed(function)(item) for item in items), what, len(items), unit))
    except TerminatedWorkerError as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"{what}: a worker process died ({reason}); try fewer workers if memory ran out") from error


def _end_with(parent: int) -> None:
    """End this worker when the process that started it is gone; loky's own workers outlive a killed one by minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
