"""Runs whose process is gone are found by their lock and closed in Prefect, MLflow and git; living ones are left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient

from flows import live
from flows.git import WorkspaceError
from flows.retrain import MOST_TRIES, _check_tries
from tests.flows.repository import git_lines, make_repository

pytestmark = pytest.mark.stack
MODEL = "live"
FLOW = """
import os, signal, sys
from pathlib import Path
from prefect import flow
from prefect.runtime import flow_run
from components.core import stage_runs
from components.recipe import load_recipe
from flows import live
from flows.sources import choose
from flows.workspace import open_workspace

@flow(name="lost", on_completion=[live.end])
def lost(how):
    here = Path.cwd()
    live.begin(here)
    with open_workspace(here, load_recipe(here, "tiny-cpu"), choose(here, None)) as workspace:
        stage_runs.open_parent(workspace.run_id, "live", {})
        live.note(here, run=workspace.run_id, model="live")
        print(flow_run.id, workspace.run_id, flush=True)
        if how == "wait":
            input()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

lost(sys.argv[1])
"""


def start(root: Path, how: str) -> tuple[subprocess.Popen[str], UUID, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FLOW, how], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    flow_run, run = process.stdout.readline().split()
    return process, UUID(flow_run), run


def prefect_state(flow_run: UUID) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run).state


def mlflow_status(run: str) -> str:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(MODEL)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`pedigree.run` = '{run}'")
    return found.info.status


def test_a_killed_run_is_closed_everywhere_and_a_living_one_is_left(stack, tmp_path):
    root = make_repository(tmp_path)
    living, living_flow, living_run = start(root, "wait")
    killed, killed_flow, killed_run = start(root, "die")
    assert killed.wait(30) == -signal.SIGKILL
    assert (prefect_state(killed_flow).name, mlflow_status(killed_run)) == ("Running", "RUNNING")
    assert [path.stem for path in live.lost(root)] == [str(killed_flow)]
    assert [noted["run"] for noted in live.running(root)] == [living_run]

    (line,) = live.close_lost(root)
    assert line == f"lost {killed_run}: its process was killed, or the machine went down; closed"
    state = prefect_state(killed_flow)
    assert state.name == "Crashed"
    assert f"(process {killed.pid})" in state.message
    assert mlflow_status(killed_run) == "KILLED"
    assert git_lines(root, "show", "-s", "--format=%s", f"runs/{killed_run}")[0].startswith("Run interrupted: its proc")
    assert live.close_lost(root) == []

    assert (prefect_state(living_flow).name, mlflow_status(living_run)) == ("Running", "RUNNING")
    living.communicate("\n", timeout=60)
    assert prefect_state(living_flow).name == "Completed"
    assert list((root / live.FOLDER).iterdir()) == []


def test_a_service_that_is_away_is_told_later(stack, tmp_path, monkeypatch):
    root = make_repository(tmp_path)
    killed, flow_run, run = start(root, "die")
    killed.wait(30)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert live.close_lost(root) == []
    assert [path.stem for path in live.lost(root)] == [str(flow_run)]
    assert len(live.close_lost(root)) == 1
    assert mlflow_status(run) == "KILLED"


def test_a_run_that_crashes_each_time_is_not_started_for_ever(monkeypatch):
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", str(MOST_TRIES))
    _check_tries()
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", str(MOST_TRIES + 1))
    with pytest.raises(WorkspaceError, match="started 5 times and never ended"):
        _check_tries()
