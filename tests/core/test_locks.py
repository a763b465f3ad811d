"""Locks between real processes: who gets them, who waits, and what a kill leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.core import locks
from components.core.locks import (
    exclusive,
    is_locked,
    record_holder,
    try_lock,
    try_record_lock,
    wait_for_lock,
)

PROJECT = Path(__file__).parents[2]
HOLD = """
import os, sys
from pathlib import Path
from components.core.locks import *
path = Path(sys.argv[1])
with {lock}:
    {then}
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, lock: str, then: str, pass_fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until its input ends."""
    code = HOLD.format(lock=lock, then=then)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        pass_fds=pass_fds,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_waits_is_told_who_holds_it_and_gets_it_when_the_holder_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "REPORT_SECONDS", 0.2)
    path = tmp_path / "folder/lock"
    with holder(path, "exclusive(path)", "path.write_text('process 7\\n')") as process:
        told: list[str] = []

        def tell(text: str) -> None:
            told.append(text)
            if len(told) == 2:  # it is told again
                process.send_signal(signal.SIGKILL)

        with exclusive(path, tell):
            assert process.wait() == -signal.SIGKILL
    assert told[:2] == ["process 7", "process 7"]
    with exclusive(path, pytest.fail):  # free, and the file stays
        assert path.exists()


def test_threads_of_one_process_exclude_each_other_unless_it_is_reentrant(tmp_path):
    path, order = tmp_path / "lock", []
    waits = threading.Event()

    def work() -> None:
        with exclusive(path, lambda _: waits.set()):
            order.append("second")

    with exclusive(path):
        thread = threading.Thread(target=work)
        thread.start()
        assert waits.wait(60)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with exclusive(path, reentrant=True), exclusive(path, pytest.fail, reentrant=True):
        pass
    with path.open() as file:
        assert try_lock(file)  # the outer one has let go too


def test_a_lock_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), exclusive(tmp_path / "file/lock"):
        pass


def test_many_share_a_lock_and_one_alone_does_not_get_it(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as one, path.open() as other, path.open() as alone:
        assert try_lock(one, shared=True)
        wait_for_lock(other, shared=True)
        assert not try_lock(alone)
        assert not is_locked(path)  # by one alone
    with path.open() as alone:
        assert try_lock(alone)
        assert is_locked(path)
    assert not is_locked(path)
    assert not is_locked(tmp_path / "none")


def test_exclusive_and_flock_exclude_each_other(tmp_path):
    path = tmp_path / "lock"
    with exclusive(path):
        assert is_locked(path)


def test_a_record_lock_names_its_process_and_ends_with_it_though_its_fork_lives(tmp_path):
    path, (read, write) = tmp_path / "lock", os.pipe()
    fork = f"try_record_lock(file); os.fork() or (os.read({read}, 1), os._exit(0))"
    with holder(path, "path.open('a') as file", fork, pass_fds=[read]) as process:
        os.close(read)
        assert record_holder(path) == process.pid
        with path.open("a") as file:
            assert not try_record_lock(file)
        process.kill()
        process.wait()
        assert record_holder(path) is None
        with path.open("a") as file:
            assert try_record_lock(file)
    os.close(write)  # which ends the fork
    assert record_holder(tmp_path / "none") is None


def test_no_other_module_locks_by_itself():
    files = [path for top in ("flows", "components", "infra") for path in (PROJECT / top).rglob("*.py")]
    imports = re.compile(r"^\s*(import|from) (fcntl|filelock)\b", re.MULTILINE)
    found = [str(path.relative_to(PROJECT)) for path in files if imports.search(path.read_text())]
    assert found == ["components/core/locks.py"]
