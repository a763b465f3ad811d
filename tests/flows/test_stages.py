"""Running a stage's command line: its lines, its errors, and that it never outlives the run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.core.progress import ProgressLine
from components.lineage.ledger import LedgerError, LedgerUnreachableError
from flows import interrupt
from flows.stages import StageFailedError, StageUnreachableError, hand_on, stream, worth_a_retry


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def written_pid(path: Path, seconds: float = 10.0) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


def run(script: str, root: Path) -> list[str]:
    lines: list[str] = []
    (root / "script.sh").write_text(script)
    stream("sh script.sh", root, lines.append)
    return lines


def failure(script: str, root: Path) -> StageFailedError:
    with pytest.raises(StageFailedError) as caught:
        run(script, root)
    return caught.value


def test_lines_of_both_streams_are_handed_on(tmp_path):
    assert run("echo one; echo two >&2; pwd", tmp_path) == ["one", "two", str(tmp_path)]


def test_what_a_stage_says_is_labeled_and_has_a_level(caplog):
    caplog.set_level("INFO")
    shown: list[float] = []
    for line in (
        "distill/small: 300 steps of 32 images",
        ProgressLine("distill/small", 30, 120, "steps", 7.5, "loss 7.5000"),
        ProgressLine("distill/small", 31, 120, "steps", 7.5, "loss 7.5000"),  # too early to be logged
        ProgressLine("crops", 8, 8, "images", 20.0),
        "checkpoint after 30 steps",
        "warning: distill/small: alert: step 30",
        "error: no images",
    ):
        hand_on("distill", logging.getLogger("flows.stages"), shown.append, str(line))
    assert shown == [25.0, 100 * 31 / 120, 100.0]
    assert [(record.levelname, record.message, hasattr(record, "detail")) for record in caplog.records] == [
        ("INFO", "distill: distill/small: 300 steps of 32 images", False),
        ("INFO", "distill: distill/small 30/120 steps (7.5 steps/s, 0:00:12 left, loss 7.5000)", True),
        ("INFO", "distill: crops 8/8 images (20.0 images/s, 0:00:00 left)", True),
        ("INFO", "distill: checkpoint after 30 steps", True),
        ("WARNING", "distill: distill/small: alert: step 30", False),
        ("ERROR", "distill: no images", True),
    ]


def test_a_line_comes_when_it_is_written(tmp_path):
    seen: list[float] = []
    (tmp_path / "script.sh").write_text("echo first; sleep 1; echo second")
    stream("sh script.sh", tmp_path, lambda _: seen.append(time.monotonic()))
    assert seen[1] - seen[0] > 0.8


def test_the_command_finds_this_python_before_any_other(tmp_path):
    lines: list[str] = []
    command = """python -c 'import sys; print(sys.executable)'"""
    stream(command, tmp_path, lines.append)
    assert Path(lines[0]).parent == Path(sys.executable).parent


def test_bytes_that_are_no_text_do_not_stop_a_stage(tmp_path):
    assert run("printf 'caf\\351\\n'", tmp_path) == ["caf\N{REPLACEMENT CHARACTER}"]


def test_the_error_lines_are_the_message(tmp_path):
    error = failure("echo 'error: first'; echo noise; echo 'error: second' >&2; echo last; exit 2", tmp_path)
    assert str(error) == "`sh script.sh` failed (exit 2): first; second"
    assert not isinstance(error, StageUnreachableError)
    assert str(failure("echo hello; echo; exit 1", tmp_path)) == "`sh script.sh` failed (exit 1): hello"
    assert str(failure("exit 1", tmp_path)) == "`sh script.sh` failed (exit 1): no output"


def test_70_is_a_defect(tmp_path):
    assert failure("echo 'error: a defect of Pedigree: KeyError'; exit 70", tmp_path).exit_code == 70
    assert failure("exit 1", tmp_path).exit_code == failure("exit 2", tmp_path).exit_code == 1


def test_75_is_a_service_that_did_not_answer(tmp_path):
    error = failure("echo 'error: S3 does not answer'; exit 75", tmp_path)
    assert isinstance(error, StageUnreachableError)
    assert str(error) == "`sh script.sh` failed (exit 75): S3 does not answer"


def test_a_killed_command_is_named(tmp_path):
    error = failure("echo working; kill -9 $$", tmp_path)
    killed = "`sh script.sh` failed (killed by SIGKILL): working"
    assert str(error) == f"{killed}; the system kills so where memory runs out: free some memory, then run again"
    assert not isinstance(error, StageUnreachableError)
    told_to_go = failure("echo working; kill -TERM $$", tmp_path)
    assert str(told_to_go) == "`sh script.sh` failed (killed by SIGTERM): working"
    assert isinstance(told_to_go, StageUnreachableError)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StageUnreachableError("S3"), True),
        (LedgerUnreachableError("S3"), True),
        (StageFailedError("wrong"), False),
        (LedgerError("wrong"), False),
        (KeyError("defect"), False),
    ],
)
def test_only_storage_and_services_are_tried_again(error, again, monkeypatch):
    class State:
        def result(self, raise_on_failure: bool) -> Any:
            return error

    assert worth_a_retry(None, None, State()) is again
    monkeypatch.setattr(interrupt, "current", interrupt.Interrupt(signal.SIGTERM))
    assert not worth_a_retry(None, None, State())


def test_a_command_dies_with_the_process_that_started_it(tmp_path):
    (tmp_path / "stage.sh").write_text("echo $$ > pid; exec sleep 600")
    code = f"""
from pathlib import Path
from flows.stages import stream
stream("sh stage.sh", Path({str(tmp_path)!r}), print)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        child = written_pid(tmp_path / "pid", seconds=30)
        assert psutil.Process(child).cmdline() == ["sleep", "600"]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(child)


def test_a_callers_error_stops_the_command_politely(tmp_path):
    (tmp_path / "stage.sh").write_text(
        "trap 'echo saved > saved; exit 0' TERM\necho $$ > pid\necho ready\nwhile :; do sleep 0.05; done\n"
    )

    def refuse(_line: str) -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        stream("sh stage.sh", tmp_path, refuse)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_command_save_its_state(tmp_path, number):
    (tmp_path / "stage.sh").write_text("trap 'echo saved > saved; exit 3' TERM\necho $$ > pid\nsleep 600 & wait\n")
    before = [signal.getsignal(each) for each in interrupt.SIGNALS]

    def tell() -> None:
        written_pid(tmp_path / "pid")
        os.kill(os.getpid(), number)
        if number == signal.SIGTERM:  # a service manager sends it to each process of a group, and more than once
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    with interrupt.handled() as interrupted, interrupt.deferred(), pytest.raises(StageFailedError, match="exit 3"):
        stream("sh stage.sh", tmp_path, lambda _: None)
    thread.join()
    assert (tmp_path / "saved").exists()
    assert interrupted.exit_code == 128 + number
    assert [signal.getsignal(each) for each in interrupt.SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_stages_ends_the_flow_at_once(number):
    with pytest.raises(KeyboardInterrupt), interrupt.handled():
        os.kill(os.getpid(), number)
    assert interrupt.current.number == number


def test_a_second_ctrl_c_waits_for_nothing():
    with interrupt.handled(), interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_command_that_was_being_started_at_a_signal_is_stopped_too(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "current", interrupt.Interrupt(signal.SIGTERM))
    (tmp_path / "stage.sh").write_text("exec sleep 600")
    with pytest.raises(StageFailedError, match="killed by SIGTERM"):
        stream("sh stage.sh", tmp_path, lambda _: None)
