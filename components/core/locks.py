"""Locks between processes, of three kinds. The kernel ends each with its holder, however that ends: none goes stale.

- `exclusive` is for a file of its own that one process holds at a time: filelock, which calls flock.
- `try_lock`, `wait_for_lock` and `is_locked` are flock itself, for what filelock lacks: a lock that several share, one
  on a folder or on a file that is renamed while it is held, and the question whether a file is held.
- `try_record_lock` and `record_holder` are POSIX record locks, for what flock lacks: they end with the process that
  took them while children that it forked, such as a loader's workers, live on; and the kernel names their holder.

No program that is started inherits a lock. Locks that are held together are taken in this order: the model's, gc's,
the run's or the preview's, a training's.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.1
REPORT_SECONDS = 600.0
_FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, process


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], object] | None = None, reentrant: bool = False) -> Generator[None]:
    """Hold a lock file alone; wait while another process holds it.

    Args:
        path: of the file, which stays when it is free again; its folder is made.
        on_wait: called with the file's text (the holder may write its name there) when another process holds the lock,
            and every ten minutes while waiting.
        reentrant: this process may take it again, in any thread.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # Its soft lock, for a filesystem without flock, would outlive a killed holder.
    lock = FileLock(path, is_singleton=reentrant, thread_local=not reentrant, fallback_to_soft=False)
    seconds, held = 0.0, False
    while not held:
        try:
            lock.acquire(timeout=seconds, poll_interval=POLL_SECONDS)
            held = True
        except Timeout:
            seconds = REPORT_SECONDS
            if on_wait is not None:
                on_wait(path.read_text().strip())
    try:
        yield
    finally:
        lock.release()


def try_lock(file: IO[Any] | int, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False, at once, where another holder rules that out."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[Any] | int, shared: bool = False) -> None:
    """Lock an open file or folder until it is closed, once no other holder rules that out."""
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Whether a process holds a file alone; the file is left as it is, and one that is not there is not held."""
    try:
        with path.open() as file:
            return not try_lock(file, shared=True)
    except FileNotFoundError:
        return False


def try_record_lock(file: IO[Any]) -> bool:
    """Lock a file that is open for writing for this process alone; return False, at once, where another holds it.

    The lock ends when this process closes the file, by whatever handle.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def record_holder(path: Path) -> int | None:
    """The process that holds a file's record lock, asked without taking it; None: no other process does."""
    try:
        with path.open() as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if kind == fcntl.F_UNLCK else process
