"""Shard-parallel work: one function mapped over shards by joblib, in order, with progress."""

# pyright: reportMissingTypeStubs=false
# (joblib has none)

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from joblib import Parallel, delayed  # pyright: ignore[reportUnknownVariableType]
from joblib.externals.loky.process_executor import TerminatedWorkerError

from components.core.cluster import ADDRESS, connected
from components.core.errors import EngineError
from components.core.progress import progress, track

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_shards(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None,
    what: str,
    unit: str = "shards",
) -> list[Result]:
    """Results of `function(item)` in the order of `items`, whichever worker finished first.

    Work goes to processes of this machine, or to the Ray cluster that `RAY_ADDRESS` names. All of its machines must
    see the files by the same paths and have the same code installed.

    Args:
        function: picklable, and independent of the other items: a killed run may call it again.
        items: one for each shard; what they hold is sent to the workers, so send paths rather than pixels.
        workers: processes; 1 runs in this process, None takes one for each CPU that this process, or Ray, may use.
        what: named in the progress display, for example "embedding".
        unit: what one item is.

    Raises:
        EngineError: a worker died, or `RAY_ADDRESS` names no cluster that can be used. Errors raised by `function` come
            through as they are.
    """
    if not items:
        return []
    address = os.environ.get(ADDRESS)
    if address and workers != 1:
        with connected(address) as cpus:
            num_workers = max(min(workers or cpus, cpus, len(items)), 1)
            # Arguments are never shared through files of this machine, as joblib does with large arrays.
            return _run_parallel(function, items, num_workers, f"{what} on Ray", unit, backend="ray", max_nbytes=None)
    num_workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if num_workers == 1:
        return [function(item) for item in track(items, what, len(items), unit)]
    initial: dict[str, Any] = {"initializer": _exit_with_parent, "initargs": (os.getpid(),)}
    return _run_parallel(function, items, num_workers, what, unit, backend="loky", **initial)


class _ReportingParallel(Parallel):
    """Tells of each finished item; joblib's Ray backend gives all results at the end only."""

    def __init__(self, advance: Callable[[int], None], **options: Any):
        super().__init__(**options)  # pyright: ignore[reportUnknownMemberType]
        self._advance, self._reported = advance, 0

    def print_progress(self) -> None:
        """Called by joblib whenever an item is finished, and at the end."""
        new = self.n_completed_tasks - self._reported
        if new:
            self._advance(new)
        self._reported += new


def _run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, unit: str, **options: Any
) -> list[Result]:
    # One shard a task, whatever joblib's annotation of batch_size says.
    options |= {"batch_size": 1, "pre_dispatch": "2*n_jobs"}
    with progress(what, len(items), unit) as advance:
        pool: Any = _ReportingParallel(advance, n_jobs=workers, **options)
        try:
            return list(pool(delayed(function)(item) for item in items))
        except Exception as error:
            if not isinstance(error, TerminatedWorkerError) and type(error).__name__ != "ActorDiedError":
                raise
            reason = str(error).splitlines()[0]
            advice = "try fewer workers if memory ran out"
            raise EngineError(f"{what}: a worker process died ({reason}); {advice}") from error


def _exit_with_parent(parent: int) -> None:
    """End this worker when the process that started it is gone; loky's own workers outlive a killed one by minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
