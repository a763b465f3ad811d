"""The retrain flow: what a run that waited takes, and that it says what it waits for."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from components.lineage.audit_anchors import TAG, git_anchors
from components.lineage.audit_log import PLATFORM, AuditLog
from tests.flows.repository import DVC, IDENTITY, git_lines, make_repository

STAGES = """
stages:
  copy:
    cmd: cp code.txt out.txt
    deps: [code.txt, data/pool]
    params: [seed]
    outs: [out.txt]
"""
FLOW = """
from flows.retrain import retrain
state = retrain(recipe="tiny-cpu", overrides=["name=waiting"], return_state=True)
print(state.name, state.message, flush=True)
"""
pytestmark = pytest.mark.stack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_repository(tmp_path)
    (root / "dvc.yaml").write_text(STAGES)
    (root / "code.txt").write_text("old\n")
    evaluation = root / "data/evaluation/photos/cd34"
    evaluation.mkdir(parents=True)
    (evaluation / "image").write_text("other bytes")
    (root / ".gitignore").write_text("/.pedigree\n/out.txt\n/data/*/*/?*\n!/data/*/*/*.dvc\n")
    subprocess.run([DVC, "add", "-q", "data/evaluation/photos/cd34"], cwd=root, check=True)
    git_lines(root, "add", "-A")
    git_lines(root, *IDENTITY, "commit", "-q", "-m", "one stage")
    return root


def test_a_run_that_waited_takes_code_and_sources_of_when_it_begins_to_work(stack, root):
    lock = root / ".pedigree/runs/waiting.running"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        held.write("process 1, since yesterday")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", FLOW], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert process.stderr is not None
        waits = "waiting for another run of waiting: process 1, since yesterday"
        assert any(waits in line for line in process.stderr)
        (root / "code.txt").write_text("new\n")
        fcntl.flock(held, fcntl.LOCK_UN)
    said, log = process.communicate(timeout=240)
    assert said.split()[0] == "Completed", said + log[-3000:]
    (branch,) = git_lines(root, "branch", "--list", "runs/*", "--format=%(refname:short)")
    assert git_lines(root, "show", f"{branch}:code.txt") == ["new"]
    ended, stage = git_lines(root, "log", "--format=%s", "-2", branch)
    assert (ended, stage.partition(" for ")[0]) == ("Run finished", "copy: ran")
    assert yaml.safe_load("\n".join(git_lines(root, "show", f"{branch}:params.yaml")))["name"] == "waiting"
    events = [e for e in AuditLog.from_environment().read(PLATFORM) if e.subject == branch.removeprefix("runs/")]
    assert [(e.action, e.details["model"]) for e in events] == [("run-started", "waiting"), ("run-ended", "waiting")]
    assert sorted(events[0].details["data"]) == ["data/evaluation/photos/cd34", "data/pool/photos/ab12"]
    assert events[1].details["how"] == "Run finished"
    anchors = {anchor.sequence: anchor.hash for anchor in git_anchors(root) if anchor.chain == PLATFORM}
    assert anchors[events[1].sequence] == events[1].hash
    tags = MlflowClient().get_experiment_by_name("waiting").tags
    assert tags[TAG] == f"{PLATFORM} {events[1].sequence} {events[1].hash}"
    run_log = (root / ".pedigree/logs/runs" / f"{branch.removeprefix('runs/')}.log").read_text().splitlines()
    assert all(line[:2] == "20" for line in run_log)  # each with its time
    assert any("copy: done in" in line for line in run_log)
