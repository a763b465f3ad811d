"""Map one function over shards by joblib, in order, with progress."""

# pyright: reportMissingTypeStubs=false

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
    """Return the results of `function(item)` in the order of `items`.

    The workers are local processes, or those of the Ray cluster that `RAY_ADDRESS` names, whose machines must all see
    the files under the same paths and have the same code installed.

    Args:
        function: picklable, independent of the other items, and safe to call again after a killed run.
        items: one for each shard; they are pickled to the workers, so pass paths rather than pixels.
        workers: number of processes; 1 runs in this process, None means one for each available CPU.
        what: label of the progress display, for example "embedding".
        unit: plural noun for the items.

    Raises:
        EngineError: a worker died, or the cluster at `RAY_ADDRESS` is unusable. Errors raised by `function` pass
            through unchanged.
    """
    if not items:
        return []
    address = os.environ.get(ADDRESS)
    if address and workers != 1:
        with connected(address) as cpus:
            num_workers = max(min(workers or cpus, cpus, len(items)), 1)
            # No memmapping of large arguments: the other machines do not see this machine's temporary files.
            return _run_parallel(function, items, num_workers, f"{what} on Ray", unit, backend="ray", max_nbytes=None)
    num_workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if num_workers == 1:
        return [function(item) for item in track(items, what, len(items), unit)]
    initial: dict[str, Any] = {"initializer": _exit_with_parent, "initargs": (os.getpid(),)}
    return _run_parallel(function, items, num_workers, what, unit, backend="loky", **initial)


class _ReportingParallel(Parallel):
    """Report each finished item; joblib's Ray backend returns all results at the end only."""

    def __init__(self, advance: Callable[[int], None], **options: Any):
        super().__init__(**options)  # pyright: ignore[reportUnknownMemberType]
        self._advance, self._reported = advance, 0

    def print_progress(self) -> None:
        """Report new items; joblib calls this after each item and at the end."""
        new = self.n_completed_tasks - self._reported
        if new:
            self._advance(new)
        self._reported += new


def _run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, unit: str, **options: Any
) -> list[Result]:
    # One shard per task; joblib's type annotation of batch_size is wrong.
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
    """End this worker when its parent process is gone; loky's workers otherwise outlive a killed parent by minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
