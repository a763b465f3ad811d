"""Students that share their teacher: each becomes what it becomes alone, whatever befalls it or another one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from components.core.config import validate
from components.core.stage_runs import stage_run
from components.core.storage import sha256_file
from components.data.stream import ImageStream
from components.distillation.config import DistillConfig
from components.distillation.stage import run, student_job
from components.model.export import save_weights
from components.training import delivery
from components.training.alerts import read_alerts
from components.training.checkpoint import Checkpoints
from components.training.initial import load_network
from components.training.loop import Job, Trainee, train, train_together
from components.training.loss_table import read_rows
from components.training.monitors import Probes
from components.training.networks import Network
from components.training.parallelize import EXIT_INTERRUPTED
from components.training.run_folder import find_trainings
from components.training.step import DivergedError
from tests.training.conftest import _one_thread, backbone, curated, pretrain_values, tiny, workspace  # noqa: F401
from tests.training.jobs import at_call, break_call, make_job

RUN = """
import json, logging, sys
from pathlib import Path
import torch
from components.distillation.config import DistillConfig
from components.distillation.stage import run
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
run(DistillConfig.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), 0, sys.argv[3])
"""
TIMES = ("images_per_second", "data_wait_share", "peak_memory_gib", "hours")


@pytest.fixture
def place(workspace, curated, pretrain_values, tmp_path_factory):  # noqa: F811
    """Makes further workspaces with the same images and the same teacher, of which `workspace` is the first."""
    student = make_job(pretrain_values(), curated).networks.student
    save_weights(workspace / "models" / "adapted", student.backbone, student.heads, {})

    def make() -> Path:
        root = tmp_path_factory.mktemp("other")
        shutil.copytree(workspace, root, symlinks=True, dirs_exist_ok=True)
        return root

    return make


@pytest.fixture
def values(tiny, backbone):  # noqa: F811
    """Values of a DistillConfig of these students; centres are state that each must keep for itself."""
    shapes = {"small": {"dim": 16}, "wide": {"depth": 3}, "third": {"dim": 48}}

    def make(*students: str, **changes: Any) -> dict[str, Any]:
        chosen = {name: {"backbone": backbone | shapes[name]} for name in students}
        return tiny(students=chosen, objective={"centering": "softmax"}) | changes

    return make


def checked(values: dict[str, Any]) -> DistillConfig:
    return validate(DistillConfig, values, "test")


def outputs(root: Path, student: str) -> dict[str, Any]:
    """What a stage made: digests of weights and pictures, and the report without what the clock says."""
    report = root / "reports" / "distill" / student
    files = [*(root / "models" / "students" / student).iterdir(), *report.glob("*.jpg")]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(report / "loss.csv")]
    return {**{path.name: sha256_file(path) for path in files}, "rows": rows}


def test_each_student_is_what_it_is_alone(place, values, workspace, monkeypatch):  # noqa: F811
    alone = place()
    for student in ("small", "wide", "third"):
        run(checked(values(student)), alone, 0, student)

    looks: list[int] = []
    targets = Network.targets
    monkeypatch.setattr(Network, "targets", lambda self, *given: looks.append(id(self)) or targets(self, *given))
    uri = f"sqlite:///{workspace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("tiny", artifact_location=f"{workspace}/artifacts")

    def stage(student: str, *students: str) -> dict[str, list[float]]:
        """Run a stage as the command line does; how often its teacher looked, and the loss that MLflow was told."""
        looks.clear()
        with stage_run("distill", student, {"name": "tiny"}, workspace) as tracked:
            figures = run(checked(values(*students)), workspace, 0, student)
        delivery.forget(workspace, figures["run_key"])
        assert len(set(looks)) <= 1
        told = client.get_metric_history(str(tracked.run_id), "loss_total")
        assert [point.step for point in told] == [1, 2, 3, 4, 5, 6]
        rows = read_rows(workspace / "reports" / "distill" / student / "loss.csv")
        assert [point.value for point in told] == [row["loss_total"] for row in rows]
        return outputs(workspace, student)

    assert stage("small", "small", "wide") == outputs(alone, "small")
    assert len(looks) == 6  # one a step
    assert not (workspace / "models" / "students" / "wide").exists()
    assert stage("wide", "small", "wide") == outputs(alone, "wide")
    assert looks == []  # taken up
    # Later a third one is added: the others are up to date.
    assert stage("third", "small", "third", "wide") == outputs(alone, "third")
    assert len(looks) == 6
    assert list((workspace / ".pedigree" / "cache" / "trained").iterdir()) == []
    assert list((workspace / ".pedigree" / "checkpoints").iterdir()) == []


def folders(root: Path) -> list[Path]:
    return sorted((root / ".pedigree" / "checkpoints").glob("*"))


def kept_steps(root: Path) -> list[list[int]]:
    """Steps behind the checkpoints of each run."""
    return [sorted(int(path.name[5:]) for path in folder.glob("step_*")) for folder in folders(root)]


def start(values: dict[str, Any], root: Path, student: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, json.dumps(values), str(root), student]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.PIPE, text=True)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_with_one_ahead_and_taken_up_by_a_stage_that_waited(place, values, workspace, caplog):  # noqa: F811
    """SIGKILL; one student loses its newest checkpoint; two stages side by side, of which one waits for the other."""
    both = values("small", "wide", steps=20, checkpoint_every_steps=4, objective={"centering": "sinkhorn"})
    alone = place()
    for student in ("small", "wide"):
        run(checked(both | {"share_teacher": False}), alone, 0, student)

    killed = start(both, workspace, "small")
    wait_until(lambda: len(kept := kept_steps(workspace)) == 2 and all(len(steps) == 2 for steps in kept), killed)
    killed.kill()
    killed.wait()
    steps = kept_steps(workspace)
    behind = steps.index(min(steps))
    shutil.rmtree(folders(workspace)[behind] / f"step_{steps[behind].pop()}")

    first = start(both, workspace, "small")
    trainers = [("distill/small", first.pid), ("distill/wide", first.pid)]
    wait_until(lambda: [(run.stage, run.process) for run in find_trainings(workspace, time.time())] == trainers, first)
    os.kill(first.pid, signal.SIGSTOP)  # holding its locks, until the other one has asked for them
    threading.Timer(1.0, os.kill, (first.pid, signal.SIGCONT)).start()
    with caplog.at_level(logging.INFO, "components"):
        run(checked(both), workspace, 0, "wide")
    said = [record.getMessage() for record in caplog.records]
    assert any(line.endswith("is training this run (`pedigree train-status`); waiting for it") for line in said)
    assert said[-1] == "distill/wide: trained by an earlier try or beside another run; taken up"
    log = first.communicate()[1]
    assert first.returncode == 0, log
    assert sorted(map(int, re.findall(r"resumed after (\d+) steps", log))) == sorted(found[-1] for found in steps)
    assert steps[0][-1] != steps[1][-1]
    for student in ("small", "wide"):
        made, expected = outputs(workspace, student), outputs(alone, student)
        assert made.pop("config.json") != expected.pop("config.json")  # which says that the teacher was not shared
        assert made == expected


@pytest.fixture
def jobs(place, values, workspace):  # noqa: F811
    """Makes the jobs of both students at their start, with one teacher."""

    def make(**changes: Any) -> list[Job]:
        config = checked(values("small", "wide", **changes))
        teacher, stream = (
            load_network(workspace / "models" / "adapted"),
            ImageStream(workspace / "data" / "curated", config.stream, 0),
        )
        return [student_job(name, config, teacher, stream, 0) for name in ("small", "wide")]

    return make


def together(jobs: list[Job], root: Path) -> Any:
    named = [(job, Checkpoints(root / job.name), Probes()) for job in jobs]
    return train_together([Trainee(*one, tracked=number == 0) for number, one in enumerate(named)])


def same(one: Job, other: Job) -> bool:
    pairs = zip(one.networks.ema.state_dict().values(), other.networks.ema.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_sigterm_saves_all(jobs, tmp_path):
    straight = jobs()
    together(straight, tmp_path / "straight")
    stopped = jobs(checkpoint_every_steps=100)
    at_call(stopped[1], 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        together(stopped, tmp_path / "stopped")
    assert ended.value.code == EXIT_INTERRUPTED
    assert len(list((tmp_path / "stopped").glob("distill/*/step_4"))) == 2
    resumed = jobs()
    together(resumed, tmp_path / "stopped")
    assert all(same(*pair) for pair in zip(straight, resumed, strict=True))


def test_one_that_diverges_stops_alone_unless_it_is_the_wanted_one(jobs, tmp_path, caplog):
    """A step that breaks is skipped by the one student that it breaks; the next one ends its part."""
    straight = jobs()
    together(straight, tmp_path / "straight")
    broken = jobs(max_skipped_steps=1, checkpoint_every_steps=5)  # due after the very step that ends one student's part
    for number in (2, 4):
        break_call(broken[1], number)
    rows, nothing = together(broken, tmp_path / "broken")
    assert nothing is None
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert same(straight[0], broken[0])
    folders = [tmp_path / "broken" / job.name for job in broken]
    skipped = [[alert.step for alert in read_alerts(path) if alert.kind == "not_finite"] for path in folders]
    assert skipped == [[], [3]]
    assert max(int(path.name[5:]) for path in folders[1].glob("step_*")) == 4
    assert (folders[1] / "diverged_step_4" / "dump.json").exists()
    assert "distill/wide: step 4: loss is not finite" in caplog.text
    # Again, when the others are done already; then nobody takes the steps that are left.
    stuck = jobs(max_skipped_steps=1)
    break_call(stuck[1], 0)
    assert together(stuck, tmp_path / "broken") == [rows, None]
    # It goes on, alone, and ends as if it had skipped that step by itself.
    again, by_itself = jobs(max_skipped_steps=1)[1], jobs(max_skipped_steps=1)[1]
    break_call(by_itself, 2)
    train(again, Checkpoints(folders[1]))
    train(by_itself, Checkpoints(tmp_path / "by_itself"))
    assert same(again, by_itself)

    wanted = jobs(max_skipped_steps=0, checkpoint_every_steps=100)
    break_call(wanted[0], 4)
    with pytest.raises(DivergedError, match=r"^distill/small: step 4: loss is not finite"):
        together(wanted, tmp_path / "wanted")
    saved = {path.parent.name: path.name for path in (tmp_path / "wanted").glob("distill/*/step_*")}
    assert saved == {"small": "step_4", "wide": "step_5"}  # the other had taken the step
