"""Three kinds of locks between processes. The kernel releases each when its holder ends, so that none goes stale.

- `exclusive` holds a dedicated lock file, by filelock, which calls flock.
- `try_lock`, `wait_for_lock` and `is_locked` call flock directly, for what filelock lacks: shared locks, locks on a
  folder or on a file that is renamed while it is locked, and the query whether a file is locked.
- `try_record_lock` and `record_holder` are POSIX record locks, for what flock lacks: they end with the process that
  took them even if forked children, such as a loader's workers, live on; and the kernel knows the holder's pid.

Started programs do not inherit locks. Locks held together are acquired in this order: model, gc, run or preview,
training.
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
    """Hold a lock file exclusively; wait while another process holds it.

    Args:
        path: of the file, which is not deleted afterwards; its folder is created.
        on_wait: called with the file's text (the holder may write its name there) when another process holds the lock,
            and every ten minutes while waiting.
        reentrant: allow this process to acquire the lock again, in any thread.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # The soft lock, a fallback for filesystems without flock, would outlive a killed holder.
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
    """Lock an open file or folder until it is closed; return False at once if another holder prevents it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[Any] | int, shared: bool = False) -> None:
    """Wait until no other holder prevents it, then lock an open file or folder until it is closed."""
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Return whether a process holds an exclusive lock on a file; False if the file does not exist."""
    try:
        with path.open() as file:
            return not try_lock(file, shared=True)
    except FileNotFoundError:
        return False


def try_record_lock(file: IO[Any]) -> bool:
    """Lock a file that is open for writing for this process; return False at once if another process holds it.

    The lock ends when this process closes any handle of the file.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def record_holder(path: Path) -> int | None:
    """Return the pid of the process that holds a file's record lock, without acquiring it; None if there is none."""
    try:
        with path.open() as file:
            query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, query))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if kind == fcntl.F_UNLCK else process
