from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from components.core.engine import map_shards
from components.core.errors import EngineError


def slow_square(number: int) -> int:
    time.sleep(0.05 * (number == 0))  # the first result comes last
    return number * number


def pid_of(_: int) -> int:
    return os.getpid()


def fail_on_three(number: int) -> int:
    if number == 3:
        raise ValueError("shard 3 is damaged")
    return number


def die_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_the_items(workers):
    assert map_shards(slow_square, range(7), workers=workers, what="squares") == [0, 1, 4, 9, 16, 25, 36]


def test_nothing_to_do():
    assert map_shards(slow_square, [], workers=None, what="nothing") == []


def test_one_worker_runs_in_this_process_and_two_do_not():
    assert set(map_shards(pid_of, range(3), workers=1, what="pids")) == {os.getpid()}
    assert os.getpid() not in map_shards(pid_of, range(3), workers=2, what="pids")


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        map_shards(fail_on_three, range(6), workers=workers, what="reading")


def test_a_dead_worker_is_named():
    with pytest.raises(EngineError, match=r"reading: a worker process died .* fewer workers"):
        map_shards(die_on_three, range(6), workers=2, what="reading")


def test_workers_end_when_their_parent_is_killed():
    call = "map_shards(time.sleep, [60] * 4, workers=2, what='sleeping')"
    code = f"import time; from components.core.engine import map_shards; {call}"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 30
        while sum("popen_loky" in " ".join(child.cmdline()) for child in children) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            children = [c for c in psutil.Process(parent.pid).children() if c.is_running()]
        time.sleep(1.5)  # the workers have begun
    finally:
        parent.kill()
        parent.wait()
    assert psutil.wait_procs(children, timeout=15)[1] == []
