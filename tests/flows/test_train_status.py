"""`pedigree train-status` over what trainings leave on the disk; the trainer itself is in tests/training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.core.storage import write_json
from components.training.loss_table import append_row
from components.training.run_folder import find_trainings
from flows.commands.train_status import NOTHING

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(60)
"""


def leave_run(root: Path, key: str, stage: str) -> Path:
    folder = root / ".pedigree" / "checkpoints" / key
    config = {"steps": 100, "batch_size": 32, "checkpoint_uri": None}
    write_json(folder / "config.json", {"stage": stage, "run_key": key, "config": config})
    (folder / "lock").touch()
    return folder


def pedigree(root: Path, *arguments: str, columns: int = 200) -> str:
    code = "import sys; from flows.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": str(columns)}
    done = subprocess.run(
        [sys.executable, "-c", code, "train-status", *arguments],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_running_and_a_stopped_training(tmp_path):
    running = leave_run(tmp_path, "a" * 24, "pretrain")
    for step in (10, 20):
        append_row(running / "loss.csv", {"step": step, "loss_total": 5.0 - step / 10, "images_per_second": 16.0})
    for step in (8, 16):
        (running / f"step_{step}").mkdir()
        os.utime(running / f"step_{step}", (1000.0 + step, 1000.0 + step))
    message = "step 20: collapse: feature_std is 0.01, below 0.1 (ranks: [0]); all images look alike"
    write_json(running / "alerts.json", [{"step": 20, "kind": "collapse", "message": message}])
    leave_run(tmp_path, "b" * 24, "distill/small")
    (tmp_path / ".pedigree" / "checkpoints" / ("c" * 24)).mkdir()  # of a delivered one

    trainer = subprocess.Popen([sys.executable, "-c", HOLD, str(running / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "held\n"
        first, second = find_trainings(tmp_path, now=1046.0)
        told = json.loads(pedigree(tmp_path, "--json"))
        shown = pedigree(tmp_path)
        narrow = pedigree(tmp_path, columns=80)
    finally:
        trainer.kill()
        trainer.wait()
    assert (first.stage, first.process, first.step, first.steps, first.loss) == ("pretrain", trainer.pid, 20, 100, 3.0)
    assert first.seconds_left == 80 * 32 / 16
    assert (first.checkpoint_step, first.checkpoint_age_seconds) == (16, pytest.approx(30.0))
    assert first.alerts == [message]
    assert (second.stage, second.process, second.step, second.loss, second.seconds_left) == (
        "distill/small", None, 0, None, None,
    )  # fmt: skip
    assert [run["run_key"][0] for run in told] == ["a", "b"]
    assert told[0]["seconds_left"] == 160.0
    assert f"process {trainer.pid}" in shown
    assert "20/100" in shown
    assert message in shown
    assert "stopped" in shown
    assert "…" not in narrow
    assert [status.process for status in find_trainings(tmp_path, time.time())] == [None, None]


def test_nothing_trains(tmp_path):
    assert pedigree(tmp_path).strip() == NOTHING
    assert json.loads(pedigree(tmp_path, "--json")) == []
