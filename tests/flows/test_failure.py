"""Where a defect shows, and what of a known error: a stage of a real run, a flow, and a command."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from httpx import ConnectError
from mlflow import MlflowClient
from prefect import flow
from typer.testing import CliRunner

from components.core.errors import PedigreeError
from components.core.storage import StorageError
from flows.cli import app
from flows.commands import train_status
from flows.commands.starting import finished
from flows.failure import failed
from tests.flows.repository import DVC, IDENTITY, PROJECT, git_lines, make_repository, pedigree

STAGES = """
stages:
  embed:
    cmd: python stage.py embed
    deps: [stage.py, data/pool]
    params: [seed]
    outs: [reports/embed]
"""
STAGE = """
import numpy as np
from components import cli
from components.core.errors import PedigreeError

def embed(config, root, seed):
    if seed == 1:
        raise PedigreeError("the pool is empty") from KeyError("planted cause")
    return np.ones(3) + np.ones(4)

cli._function = lambda stage: embed
cli.main()
"""
PLANTED = "return np.ones(3) + np.ones(4)"
SAID = "a defect of Pedigree: ValueError: operands could not be broadcast together with shapes (3,) (4,)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of one stage, which is broken."""
    root = make_repository(tmp_path)
    (root / "dvc.yaml").write_text(STAGES)
    (root / "stage.py").write_text(STAGE)
    evaluation = root / "data/evaluation/photos/cd34"
    evaluation.mkdir(parents=True)
    (evaluation / "image").write_text("other bytes")
    (root / ".gitignore").write_text("/.pedigree\n/reports/\n/data/*/*/?*\n!/data/*/*/*.dvc\n")
    subprocess.run([DVC, "add", "-q", "data/evaluation/photos/cd34"], cwd=root, check=True)
    git_lines(root, "add", "-A")
    git_lines(root, *IDENTITY, "commit", "-q", "-m", "one stage")
    return root


def run(root: Path, *options: str, before: tuple[str, ...] = ()) -> Any:
    arguments = [*before, "run", "--recipe", "tiny-cpu", "--set", "name=planted", *options]
    return pedigree(root, *arguments, env={"PYTHONPATH": str(PROJECT)}, seconds=240)


def prefect(path: str, body: dict[str, Any]) -> Any:
    token = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def logged(flow_run: str, text: str) -> list[dict[str, Any]]:
    """Prefect's log lines of a run with `text`, once there is one: they are sent a little later."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        lines = prefect("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}})
        if found := [line for line in lines if text in line["message"]]:
            return found
        time.sleep(0.5)
    return []


@pytest.mark.stack
def test_a_defect_in_a_stage_shows_on_the_console_in_prefect_and_in_mlflow(stack, root):
    done = run(root)
    assert done.returncode == 70, done.stderr
    assert PLANTED in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: `python stage.py embed` failed (exit 70): {SAID}; traceback: in the log and traceb")

    (log,) = (root / ".pedigree/logs/runs").glob("*.log")
    assert PLANTED in log.read_text()
    (flow_run,) = prefect("/flow_runs/filter", {"flow_runs": {"name": {"any_": [log.stem]}}})
    assert flow_run["state"]["type"] == "FAILED"
    assert flow_run["state"]["message"] == last.removeprefix("error: ")
    assert any(line["task_run_id"] for line in logged(flow_run["id"], PLANTED))

    client = MlflowClient()
    experiment = client.get_experiment_by_name("planted").experiment_id
    (stage,) = client.search_runs([experiment], "tags.`pedigree.stage` = 'embed'")
    assert stage.info.status == "FAILED"
    assert stage.info.run_id in last
    assert PLANTED in Path(client.download_artifacts(stage.info.run_id, "traceback.txt", str(root.parent))).read_text()

    known = run(root, "--set", "seed=1", before=("--traceback",))
    assert known.returncode == 1
    assert "KeyError: 'planted cause'" in known.stderr
    assert known.stderr.splitlines()[-1] == "error: `python stage.py embed` failed (exit 1): the pool is empty"


@pytest.mark.stack
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyError("planted"), 70, "a defect of Pedigree: KeyError: 'planted'; traceback: in the log"),
        (PedigreeError("one\ntwo"), 1, "one\ntwo"),
        (StorageError("S3"), 75, "S3"),
        (ConnectError("gone"), 75, "Prefect at "),
    ],
)
def test_how_a_flow_ends(stack, caplog, error, code, told):
    @flow(persist_result=False)
    def broken() -> Any:
        try:
            raise error
        except Exception as raised:
            return failed(raised)

    with pytest.raises(PedigreeError) as caught:
        finished(broken)
    assert str(caught.value).startswith(told)
    assert caught.value.exit_code == code
    shown = [record for record in caplog.records if record.levelno == logging.ERROR and record.exc_info]
    assert bool(shown) == (code == 70)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyError("planted"), 70, "error: a defect of Pedigree: KeyError: 'planted'; traceback: above"),
        (PedigreeError("wrong"), 1, "error: wrong"),
        (StorageError("S3 does not answer"), 1, "error: S3 does not answer"),
    ],
)
@pytest.mark.parametrize("asked", [[], ["--traceback"]])
def test_how_a_command_ends(monkeypatch, error, code, told, asked):
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(train_status, "find_trainings", broken)
    monkeypatch.setenv("PEDIGREE_TRACEBACK", "")  # so that it is put back
    monkeypatch.delenv("PEDIGREE_TRACEBACK")
    done = CliRunner().invoke(app, [*asked, "train-status"])
    assert done.exit_code == code
    assert done.stderr.splitlines()[-1] == told
    assert ("Traceback" in done.stderr) == (code == 70 or bool(asked))
