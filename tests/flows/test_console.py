"""What a person sees of a run: a real one on a terminal and in a pipe, and the display by itself."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from components.core.progress import ProgressLine
from flows import console as module
from flows.console import Board
from tests.flows.repository import DVC, IDENTITY, git_lines, make_repository, pedigree, pedigree_command

STAGE = """
import logging, sys
from pathlib import Path
from components.core.log_levels import LevelFormatter
from components.core.progress import CHECKPOINT_LINE, track

name = sys.argv[1]
lines = logging.StreamHandler()
lines.setFormatter(LevelFormatter())
logging.basicConfig(level=logging.INFO, handlers=[lines])
for _ in track(range(4), name, 4, "steps"):
    pass
logging.info(CHECKPOINT_LINE, 4)
logging.warning("%s: the light was poor", name)
logging.info("%s: wrote it", name)
Path(f"{name}.txt").write_text(Path("params.yaml").read_text())
"""
STAGES = """
stages:
  left:
    cmd: python stage.py left
    deps: [stage.py, data/pool]
    params: [seed]
    outs: [left.txt]
  right:
    cmd: python stage.py right
    deps: [stage.py, left.txt]
    outs: [right.txt]
"""
DISPLAY = """
import logging, select, signal, sys
from flows.console import board, screen, shown
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
logging.basicConfig(level=logging.INFO, handlers=[screen])
screen.setFormatter(logging.Formatter("%(message)s"))
with shown():
    board.plan(["left"], {})
    with board.working("left", "looking for earlier outputs"):
        print("stray")
        logging.info("begun")
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            pass  # a signal that comes just before a read that has no end would wait for the read
        raise KeyError("a defect")
"""
BARS = """
import components.lineage.ledger
from dvc.progress import Tqdm
from dvc.ui import ui
from dvc_data.callbacks import Tqdm as DataTqdm
for bar in (Tqdm, DataTqdm):
    list(bar(range(3), desc="bar"))
with ui.status("spinner"):
    print("said")
"""
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def text_of(board: Board, width: int = 120, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    Console(file=file, width=width, force_terminal=False).print(board)
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


class Terminal:
    """A terminal of its own, of which a process has the other end."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))

    def read(self, until: str | None = None) -> str:
        """All that is written; closes this process's end of the slave side first."""
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1
        said = b""
        while until is None or until.encode() not in said:
            try:
                said += os.read(self.master, 65536)
            except OSError:  # EIO: the last writer has gone
                break
        return said.decode(errors="replace")


def plain(screen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).replace("\r", "\n")


def test_rows_say_where_each_stage_is_and_when_the_trainings_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    board = Board()
    assert text_of(board) == []
    trainings = {"pretrain": (100, 32), "adapt": (10, 64), "distill": (5, 32)}
    board.plan(["embed", "pretrain", "adapt", "distill"], trainings)
    with board.working("embed", "starting"):
        assert text_of(board)[0].endswith("starting, 0:00:00 so far")
        assert text_of(board)[-1] == "0 of 4 stages done in 0:00:00"  # nothing is measured, so nothing is guessed
    with board.working("pretrain", ""), board.working("distill", ""):
        now[0] = 50.0
        assert board.move("pretrain", ProgressLine("pretrain", 50, 100, "steps", 1.0, "loss 7.5000, 32.0 images/s"))
        now[0] = 55.0
        first, second, last = text_of(board)
        figures = "0:00:45 left, loss 7.5000, 32.0 images/s, 50/100 steps, 0:00:55 so far"
        assert first.startswith("2 of 4 pretrain ━━━━━━")
        assert first.endswith(figures)
        assert second.startswith("4 of 4 distill ")
        # 45 s, and at 32 images a second 20 s for 640 images of adapt and 5 s for 160 of distill.
        assert last == "1 of 4 stages done in 0:00:55; training takes about 0:01:10 more, at this speed"
        assert all(line.isascii() for line in text_of(board, encoding="latin-1"))
        assert all(len(line) <= 40 for line in text_of(board, width=40))
    with board.working("adapt", ""):
        pass
    assert text_of(board) == ["4 of 4 stages done in 0:00:55"]


def test_a_stage_that_fails_is_not_done():
    board = Board()
    board.plan(["pretrain"], {"pretrain": (100, 32)})
    with pytest.raises(ValueError, match="no"), board.working("pretrain", ""):
        raise ValueError("no")
    assert text_of(board) == ["0 of 1 stages done in 0:00:00"]


def test_progress_is_logged_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    board, logged = Board(), []
    for second in range(61):
        now[0] = float(second)
        if board.move("embed", ProgressLine("embedding pool", second, 60, "shards", 1.0)):
            logged.append(second)
    assert logged == [0, 9, 18, 27, 36, 45, 54, 60]
    assert text_of(board) == []  # what is no stage ends with its last unit


@pytest.mark.parametrize("end", ["interrupt", "defect"])
def test_the_cursor_comes_back_however_it_ends(end):
    terminal = Terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", DISPLAY], stdin=subprocess.PIPE, stdout=terminal.slave, stderr=terminal.slave, text=True,
        env={**os.environ, "TERM": "xterm"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    said = terminal.read(until="begun")
    assert process.stdin is not None
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        process.stdin.write("go on\n")
        process.stdin.flush()
    said += terminal.read()
    assert process.wait(30) != 0
    assert "1 of 1 left" in plain(said)
    assert said.count(HIDE) == said.count(SHOW) == 1
    assert said.index(SHOW) < said.index("Traceback")
    assert ("KeyboardInterrupt" if end == "interrupt" else "KeyError: 'a defect'") in said


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "xterm", "TTY_INTERACTIVE": "0"}])
def test_a_terminal_without_a_cursor_gets_lines(env):
    terminal = Terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", DISPLAY], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal.slave,
        text=True, env={**os.environ, **env}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    said = terminal.read()
    assert process.communicate()[0] == ""  # what libraries print is not the command's result
    assert HIDE not in said
    assert re.match(r"stray\r\n\d{4}-\d\d-\d\d \d\d:\d\d:\d\d begun\r\n", said)


def test_dvc_draws_nothing_of_its_own():
    terminal = Terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", BARS], stdout=terminal.slave, stderr=terminal.slave, env={**os.environ, "TERM": "xterm"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert plain(terminal.read()).split() == ["said"]
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def root(stack, tmp_path_factory) -> Path:
    """A repository of two short stages."""
    root = make_repository(tmp_path_factory.mktemp("console"))
    (root / "dvc.yaml").write_text(STAGES)
    (root / "stage.py").write_text(STAGE)
    (root / ".gitignore").write_text("/.pedigree\n/*.txt\n/data/*/*/?*\n!/data/*/*/*.dvc\n")
    evaluation = root / "data/evaluation/photos/cd34"
    evaluation.mkdir(parents=True)
    (evaluation / "image").write_text("other bytes")
    subprocess.run([DVC, "add", "-q", "data/evaluation/photos/cd34"], cwd=root, check=True)
    git_lines(root, "add", "-A")
    git_lines(root, *IDENTITY, "commit", "-q", "-m", "two stages")
    return root


RUN = ("run", "--recipe", "tiny-cpu", "--set", "name=console")


@pytest.mark.stack
def test_a_run_on_a_terminal_is_one_display_and_lines_above_it(root):
    terminal = Terminal()
    process = subprocess.Popen(
        pedigree_command(*RUN, "--json"), cwd=root, stdout=subprocess.PIPE, stderr=terminal.slave, text=True,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    said = terminal.read()
    assert process.stdout is not None
    result = json.loads(process.stdout.read())  # and nothing else
    assert process.wait(60) == 0, said
    assert result["outcomes"] == {"left": "ran", "right": "ran"}
    assert said.count(HIDE) == said.count(SHOW) == 1
    screen = plain(said)
    assert "1 of 2 left" in screen
    assert "2 of 2 right" in screen
    assert re.search(r"0:00:00 left, [\d.]+ steps/s, 4/4 steps, ", screen)
    assert "1 of 2 stages done in 0:" in screen
    lines = screen.splitlines()
    for name in ("left", "right"):
        assert lines.count(f"{name}: wrote it") == lines.count(f"warning: {name}: the light was poor") == 1
    kept = (root / f".pedigree/logs/runs/{result['run']}.log").read_text()
    for detail in ("checkpoint after 4 steps", "python stage.py", "4/4 steps ("):
        assert kept.count(f": {detail}") == 2
        assert detail not in screen
    assert len(re.findall(r" WARNING (?:left|right): the light was poor", kept)) == 2
    for other in ("Finished in state", "Beginning flow run", "%|", "Traceback"):
        assert other not in said


@pytest.mark.stack
def test_a_run_in_a_pipe_is_lines_with_their_times(root):
    done = pedigree(root, *RUN, "--set", "seed=1")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = [line[20:] for line in lines]
    for name in ("left", "right"):
        own = [line for line in said if line.partition(": ")[0] == name or line.startswith(f"warning: {name}: ")]
        assert [re.sub(r" \(.*| in \d+ s", "", line).partition("/")[0] for line in own] == [
            f"{name}: python stage.py {name}", f"{name}: 1", f"{name}: 4", f"{name}: checkpoint after 4 steps",
            f"warning: {name}: the light was poor", f"{name}: wrote it", f"{name}: done",
        ]  # fmt: skip
    assert "recorded as git branch" in done.stdout
