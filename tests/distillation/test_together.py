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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.core.config import validate
from components.core.stage_runs import stage_run
from components.core.storage import sha256_file
from components.data.stream import ImageStream
from components.distillation import stage
from components.distillation.config import DistillConfig
from components.distillation.stage import CODE, REPORTS, run, student_job
from components.distillation.together import SharedTeacher, StudentGroup, joint_flops
from components.model.vit import VisionTransformer
from components.training.alerts import read_alerts
from components.training.checkpoint import Checkpoints
from components.training.cost import training_flops
from components.training.initial import load_network
from components.training.loop import Job, Run, train
from components.training.loss_table import read_rows
from components.training.parallelize import EXIT_INTERRUPTED
from components.training.run_folder import find_trainings
from components.training.step import DivergedError
from tests.training.conftest import _one_thread, backbone, curated, pretrain_values, tiny, workspace  # noqa: F401
from tests.training.jobs import at_call, break_call, train_job, write_teacher

RUN = """
import json, logging, sys
from pathlib import Path
import torch
from components.distillation.config import DistillConfig
from components.distillation.stage import run
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
run(DistillConfig.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), 0, "tiny")
"""
TIMES = ("images_per_second", "data_wait_share", "peak_memory_gib", "hours")
TAKEN = "distill/%s: trained by an earlier run from the same inputs; taken from the cache"


@pytest.fixture
def place(workspace, curated, pretrain_values, tmp_path_factory):  # noqa: F811
    """Makes further workspaces with the same images and the same teacher, of which `workspace` is the first."""
    write_teacher(pretrain_values(), curated, workspace / "models" / "adapted")
    write_code(workspace, "as it is")

    def make() -> Path:
        root = tmp_path_factory.mktemp("other")
        shutil.copytree(workspace, root, symlinks=True, dirs_exist_ok=True)
        return root

    return make


@pytest.fixture
def values(tiny, backbone):  # noqa: F811
    """Values of a DistillConfig of these students; centers are state that each must keep for itself."""
    shapes = {"small": {"dim": 16}, "wide": {"depth": 3}, "third": {"dim": 48}}

    def make(*students: str, **changes: Any) -> dict[str, Any]:
        chosen = {name: {"backbone": backbone | shapes[name]} for name in students}
        return tiny(students=chosen, objective={"centering": "softmax"}) | changes

    return make


def checked(values: dict[str, Any]) -> DistillConfig:
    return validate(DistillConfig, values, "test")


def write_code(root: Path, text: str) -> None:
    """The list of the stage's code, as the stage `code` writes it."""
    (root / CODE).parent.mkdir(parents=True, exist_ok=True)
    (root / CODE).write_text(text)


def outputs(root: Path, student: str) -> dict[str, Any]:
    """What the stage made of a student: digests of weights and pictures, and the report without what the clock says."""
    report = root / REPORTS / student
    files = [*(root / "models" / "students" / student).iterdir(), *report.glob("*.jpg")]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(report / "loss.csv")]
    return {**{path.name: sha256_file(path) for path in files}, "rows": rows}


@pytest.fixture
def looks(monkeypatch) -> list[None]:
    """Forward passes of the teacher's backbone; no student has its shape."""
    seen: list[None] = []
    forward = VisionTransformer.forward

    def counted(self: VisionTransformer, *given: Any) -> Any:
        if (self.config.dim, self.config.depth) == (32, 2):
            seen.append(None)
        return forward(self, *given)

    monkeypatch.setattr(VisionTransformer, "forward", counted)
    return seen


def test_each_student_is_what_it_is_alone_and_is_trained_once(place, values, workspace, looks, caplog, monkeypatch):  # noqa: F811
    alone = {}
    for student in ("small", "wide", "third"):
        root = place()
        run(checked(values(student)), root, 0, "tiny")
        alone[student] = outputs(root, student)

    uri = f"sqlite:///{workspace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("tiny", artifact_location=f"{workspace}/artifacts")
    caplog.set_level(logging.INFO, "components")

    def made(*students: str) -> tuple[dict[str, Any], list[str], int]:
        """Run the stage as the command line does: figures, students with new runs in MLflow, the teacher's looks."""
        looks.clear()
        caplog.clear()
        with stage_run("distill", None, {"name": "tiny"}, workspace) as tracked:
            figures = run(checked(values(*students)), workspace, 0, "tiny")
        logged = [found for found in client.search_runs([experiment]) if "pedigree.item" in found.data.tags]
        for found in logged:
            student, run_id = found.data.tags["pedigree.item"], found.info.run_id
            told = client.get_metric_history(run_id, "loss_total")
            rows = read_rows(workspace / REPORTS / student / "loss.csv")
            assert [(point.step, point.value) for point in told] == [(row["step"], row["loss_total"]) for row in rows]
            assert {file.path for file in client.list_artifacts(run_id)} == {"loss.csv", "crops.jpg", "pca.jpg"}
            assert (found.info.status, found.data.metrics["steps"]) == ("FINISHED", 6)
            client.delete_run(run_id)
        assert "loss_total" not in client.get_run(str(tracked.run_id)).data.metrics
        assert {path.name for path in (workspace / "models" / "students").iterdir()} == set(students)
        assert {path.name for path in (workspace / REPORTS).iterdir()} == set(students)
        assert all(outputs(workspace, student) == alone[student] for student in students)
        return figures, sorted(found.data.tags["pedigree.item"] for found in logged), len(looks)

    figures, logged, count = made("small", "wide")
    assert (list(figures), logged, count) == (["small", "wide"], ["small", "wide"], 6)  # one look a step
    before = (workspace / REPORTS / "small" / "loss.csv").read_bytes()
    # A third one is added: the others are taken from the cache, as DVC has cleared the stage's outputs away.
    shutil.rmtree(workspace / "models" / "students")
    again, logged, count = made("small", "third", "wide")
    assert (logged, count) == (["third"], 6)
    assert {student: again[student] for student in figures} == figures
    assert [line for line in caplog.messages if "taken from" in line] == [TAKEN % "small", TAKEN % "wide"]
    assert (workspace / REPORTS / "small" / "loss.csv").read_bytes() == before
    assert list((workspace / ".pedigree" / "checkpoints").iterdir()) == []
    # Other code may compute other weights, and where no list says which code it is, nothing is kept.
    write_code(workspace, "changed")
    assert made("small")[1:] == (["small"], 6)
    (workspace / CODE).unlink()
    assert made("small")[1:] == (["small"], 6)
    assert figures["small"]["run_key"] not in {path.name for path in (workspace / ".pedigree/cache/trained").iterdir()}


def folders(root: Path) -> list[Path]:
    return sorted((root / ".pedigree" / "checkpoints").glob("*"))


def kept_steps(root: Path) -> list[list[int]]:
    """Steps behind the checkpoints of each run."""
    return [sorted(int(path.name[5:]) for path in folder.glob("step_*")) for folder in folders(root)]


def start(values: dict[str, Any], root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, json.dumps(values), str(root)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.PIPE, text=True)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)


def go_on_once(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    try:
        wait_until(reached, process)
    finally:  # a process that stands still would be waited for without end
        process.send_signal(signal.SIGCONT)


def test_killed_with_one_ahead_and_taken_up_by_a_process_that_waited(place, values, workspace, caplog):  # noqa: F811
    """SIGKILL; one student loses its newest checkpoint; two processes side by side, of which one waits."""
    both = values("small", "wide", steps=20, checkpoint_every_steps=4, objective={"centering": "sinkhorn"})
    alone = place()
    run(checked(both | {"share_teacher": False}), alone, 0, "tiny")

    killed = start(both, workspace)
    wait_until(lambda: len(kept := kept_steps(workspace)) == 2 and all(len(steps) == 2 for steps in kept), killed)
    killed.kill()
    killed.wait()
    steps = kept_steps(workspace)
    behind = steps.index(min(steps))
    shutil.rmtree(folders(workspace)[behind] / f"step_{steps[behind].pop()}")

    first = start(both, workspace)
    trainers = [("distill/small", first.pid), ("distill/wide", first.pid)]
    wait_until(lambda: [(run.stage, run.process) for run in find_trainings(workspace, time.time())] == trainers, first)
    os.kill(first.pid, signal.SIGSTOP)  # holding its locks, until the other one has asked for them
    caplog.set_level(logging.INFO, "components")
    asked = threading.Thread(target=go_on_once, args=(first, lambda: "waiting for it" in caplog.text), daemon=True)
    asked.start()
    run(checked(both), workspace, 0, "tiny")
    asked.join()
    assert caplog.messages[-2:] == [TAKEN % "small", TAKEN % "wide"]
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

    def make(**changes: Any) -> dict[str, Job]:
        config = checked(values("small", "wide", **changes))
        teacher, stream = (
            load_network(workspace / "models" / "adapted"),
            ImageStream(workspace / "data" / "curated", config.stream, 0),
        )
        return {name: student_job(name, config, teacher, stream, 0) for name in ("small", "wide")}

    return make


def train_together(jobs: dict[str, Job], root: Path) -> StudentGroup:
    together = StudentGroup({n: Run(job, job.training_step(), Checkpoints(root / n)) for n, job in jobs.items()})
    train(together)
    return together


def same(one: Job, other: Job) -> bool:
    pairs = zip(one.networks.ema.state_dict().values(), other.networks.ema.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_sigterm_saves_all(jobs, tmp_path):
    straight = jobs(accumulation_steps=2)
    train_together(straight, tmp_path / "straight")
    by_itself = jobs(accumulation_steps=2)["wide"]
    train_job(by_itself, Checkpoints(tmp_path / "by_itself"))
    assert same(by_itself, straight["wide"])
    stopped = jobs(accumulation_steps=2, checkpoint_every_steps=100)
    at_call(stopped["wide"], 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train_together(stopped, tmp_path / "stopped")
    assert ended.value.code == EXIT_INTERRUPTED
    assert len(list((tmp_path / "stopped").glob("*/step_4"))) == 2
    resumed = jobs(accumulation_steps=2)
    train_together(resumed, tmp_path / "stopped")
    assert all(same(straight[name], resumed[name]) for name in straight)


def test_one_that_diverges_stops_alone(jobs, tmp_path, caplog):
    """A step that breaks is skipped by the one student that it breaks; the next one ends its part."""
    straight = jobs()
    train_together(straight, tmp_path / "straight")
    broken = jobs(max_skipped_steps=1, checkpoint_every_steps=5)  # due after the very step that ends one student's part
    for number in (2, 4):
        break_call(broken["wide"], number)
    ended = train_together(broken, tmp_path / "broken")
    assert list(ended.diverged) == ["wide"]
    assert [row["step"] for row in ended.students["small"].rows] == [1, 2, 3, 4, 5, 6]
    assert same(straight["small"], broken["small"])
    folders = [tmp_path / "broken" / name for name in broken]
    skipped = [[alert.step for alert in read_alerts(path) if alert.kind == "not_finite"] for path in folders]
    assert skipped == [[], [3]]
    assert max(int(path.name[5:]) for path in folders[1].glob("step_*")) == 4
    assert (folders[1] / "diverged_step_4" / "dump.json").exists()
    assert "distill/wide: step 4: loss is not finite" in caplog.text
    # It goes on, alone, and ends as if it had skipped that step by itself.
    again, by_itself = jobs(max_skipped_steps=1)["wide"], jobs(max_skipped_steps=1)["wide"]
    break_call(by_itself, 2)
    train_job(again, Checkpoints(folders[1]))
    train_job(by_itself, Checkpoints(tmp_path / "by_itself"))
    assert same(again, by_itself)
    # Nobody is left: no step more is taken.
    broken = jobs(max_skipped_steps=0)
    for number, job in enumerate(broken.values()):
        break_call(job, number)
    with pytest.raises(DivergedError, match=r"^distill/small: step 0: loss is not finite"):
        train_together(broken, tmp_path / "none")


def test_what_the_others_learned_is_taken_up_after_one_diverged(place, values, workspace, monkeypatch, caplog):  # noqa: F811
    def breaking(name: str, *given: Any) -> Job:
        job = student_job(name, *given)
        if name == "small":
            break_call(job, 3)
        return job

    caplog.set_level(logging.INFO, "components")
    both = values("small", "wide", max_skipped_steps=0)
    monkeypatch.setattr(stage, "student_job", breaking)
    with pytest.raises(DivergedError, match=r"^distill/small: step 3: loss is not finite"):
        run(checked(both), workspace, 0, "tiny")
    assert not (workspace / "models" / "students").exists()
    monkeypatch.undo()
    run(checked(both), workspace, 0, "tiny")
    assert "distill/wide: trained by an earlier try; its results are reused" in caplog.messages
    assert "resumed after 3 steps" in caplog.text
    alone = place()
    shutil.rmtree(alone / ".pedigree")
    run(checked(both), alone, 0, "tiny")
    assert all(outputs(workspace, student) == outputs(alone, student) for student in ("small", "wide"))


def test_operations_of_students_whose_teacher_looks_once(jobs):
    both = list(jobs().values())
    apart = sum(training_flops(job.networks, job.config.crops, None) for job in both)
    job = both[0]
    job.training_step()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        job.networks.teacher.backbone(torch.randn(2, 3, 32, 32))
    assert apart - joint_flops(both) == counter.get_total_flops()


def test_a_look_is_kept_for_those_that_follow_and_no_longer(jobs):
    job = jobs()["small"]
    job.training_step()
    shared = SharedTeacher(job.networks.teacher.backbone)
    parts = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    shared.select(first=True, last=False)
    first = [shared(part) for part in parts]
    assert len(shared._features) == 2
    for last in (False, True):
        shared.select(first=False, last=last)
        assert all(shared(part) is seen for part, seen in zip(parts, first, strict=True))
    assert not shared._features
