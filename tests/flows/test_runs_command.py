"""`pedigree runs` over real runs, with and without the services."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.core.git import git
from components.lineage.runs import find_runs, registered
from flows import workspace
from flows.cli import app
from tests.lineage.short_runs import ShortRuns, make_short_runs, write_result

pytestmark = pytest.mark.stack


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of one second in the order in which they were made."""
    numbers = iter(range(1000))
    monkeypatch.setattr(workspace.secrets, "token_hex", lambda _: f"{next(numbers):04x}")


@pytest.fixture
def runs(stack, tmp_path: Path, numbered: None, monkeypatch: pytest.MonkeyPatch) -> ShortRuns:
    made = make_short_runs(tmp_path)
    monkeypatch.chdir(made.root)
    return made


def listed(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["runs", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_each_state_and_outcome(runs: ShortRuns, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    first = runs.run(1, register=True)
    again = runs.run(1)
    failed = runs.run(2, until="curate", ending="Run failed: disk full; make room")
    stopped = runs.run(3, until="curate", ending="Run interrupted: Ctrl-C")
    lost = runs.run(4, until="adapt", ending="")
    client = MlflowClient()
    client.create_registered_model(runs.name)
    client.create_model_version(
        runs.name, "s3://elsewhere/m-1", tags={"pedigree.candidate": f"{runs.name}-candidates/1"}
    )
    client.set_registered_model_alias(runs.name, "champion", "1")
    with runs.going(5) as running:
        found = listed()
    rows = {row["run"]: row for row in found["runs"]}
    made = [running, lost, stopped, failed, again, first]
    assert [row["run"] for row in found["runs"]] == [work.run_id for work in made]  # newest first
    states = ["running", "lost", "interrupted", "failed", "finished", "finished"]
    assert [row["state"] for row in found["runs"]] == states
    candidate = f"{runs.name}-candidates 1"
    assert rows[first.run_id]["outcome"] == f"{candidate} (champion as {runs.name} 1)"
    assert rows[first.run_id]["registered"] == [candidate]
    assert rows[again.run_id]["outcome"] == "nothing computed"
    assert rows[failed.run_id]["outcome"] == "disk full; make room"
    assert rows[stopped.run_id]["outcome"] == "Ctrl-C"
    assert rows[lost.run_id]["outcome"] == "no closing commit; the last one: curate: ran for 0 s"
    assert rows[running.run_id]["ended"] is None
    assert found["notes"] == []
    # The first two need the same objects; the lost one has a curated set of its own.
    assert rows[first.run_id]["bytes_objects"] == rows[again.run_id]["bytes_objects"] == 0
    curated = lost.root / "data/curated/00000.tar"
    assert curated.stat().st_size < rows[lost.run_id]["bytes_objects"] < curated.stat().st_size + 1000
    assert rows[stopped.run_id]["bytes_objects"] == 0
    assert rows[first.run_id]["bytes_folder"] == 0  # older folders are removed
    assert 0 < rows[lost.run_id]["bytes_folder"] < curated.stat().st_size  # without what is linked to the cache

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    alone = listed()
    assert "champions are not shown: " in alone["notes"][0]
    assert [row["registered"] for row in alone["runs"]] == [row["registered"] for row in found["runs"]]
    text = CliRunner().invoke(app, ["runs"]).output
    assert "that only this run needs" in text
    assert all(work.run_id in text for work in made)


def repository(root: Path) -> Path:
    git(root, "init", "--quiet", "--initial-branch", "main")
    (root / "dvc.yaml").write_text("stages: {}\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "start")
    return root


def test_a_run_that_just_starts_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repository(tmp_path))
    assert "no runs yet" in CliRunner().invoke(app, ["runs"]).output
    folder = tmp_path / ".pedigree/runs"
    folder.mkdir(parents=True)
    with (folder / "20260101-000000-abcd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run,) = find_runs(tmp_path)
        assert (run.id, run.state, run.started) == ("20260101-000000-abcd", "running", None)
        assert registered(tmp_path, run) == []
        assert listed()["runs"][0]["state"] == "running"
    assert find_runs(tmp_path) == []


def test_versions_of_the_checkout_are_not_a_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A result that was committed to the checkout's own branch is in every run's commits."""
    monkeypatch.chdir(repository(tmp_path))
    write_result(tmp_path, "old-candidates", 9)
    git(tmp_path, "add", "--force", "reports")
    for branch, message in (("main", "Keep a result"), ("runs/one", "Run one"), ("runs/one", "Run failed: x")):
        git(tmp_path, "checkout", "--quiet", "-B", branch)
        git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", message)
    git(tmp_path, "checkout", "--quiet", "main")
    (row,) = listed()["runs"]
    assert (row["state"], row["outcome"], row["registered"]) == ("failed", "x", [])
