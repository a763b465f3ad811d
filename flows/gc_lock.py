"""Exclude runs and `pedigree gc` from each other: many concurrent runs, or one gc, for all worktrees of a repository.

A run holds the lock from before its first commit to its end, so that gc never sees outputs that are not yet committed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from components.core.git import git
from components.core.locks import try_lock, wait_for_lock
from components.lineage.runs import find_runs
from flows.git import WorkspaceError

log = logging.getLogger(__name__)


@contextmanager
def no_gc_beside(checkout: Path) -> Iterator[None]:
    """Exclude `pedigree gc` inside the block; wait for a running one."""
    with _lock_file(checkout) as file:
        if not try_lock(file, shared=True):
            log.warning("`pedigree gc` is working; the run starts when it has ended")
            wait_for_lock(file, shared=True)
        yield


@contextmanager
def no_run_beside(checkout: Path, by: str = "pedigree gc") -> Iterator[None]:
    """Exclude runs inside the block, for `pedigree gc` or another command that removes data.

    Raises:
        WorkspaceError: a run or another gc is in progress.
    """
    with _lock_file(checkout) as file:
        free = try_lock(file)
        running = [f"run {run.id}" for run in find_runs(checkout) if run.locked]
        if running or not free:
            who = ", ".join(running) or "another `pedigree gc`, or a run that just starts,"
            raise WorkspaceError(f"{who} is in progress; nothing was removed: run `{by}` again once it ends")
        yield


def _lock_file(checkout: Path) -> IO[str]:
    folder = Path(checkout, git(checkout, "rev-parse", "--git-common-dir"))
    return (folder / "pedigree-gc.lock").open("a")
