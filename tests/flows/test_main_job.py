"""The main job, whole, as a person runs it: real images, real services, a repository of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.storage import s3_client, split_s3_uri
from components.data.evaluation_set import read_evaluation_set
from components.data.provenance import SUFFIX
from components.data.shards import ShardReader
from components.evaluation.features import EvaluationImages
from components.evaluation.protocols import knn
from components.lineage.code import list_of, read_list
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record
from components.model.export import load_backbone
from components.model.pooling import features
from components.model.preprocessing import to_input
from components.recipe import load_recipe
from flows.cli import app
from tests.lineage.test_code import unlisted

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = (
    "pretrain.steps=16", "pretrain.batch_size=16", "pretrain.optimizer.warmup_steps=2",
    "pretrain.checkpoint_every_steps=2", "adapt.steps=2",
    "adapt.batch_size=8", "adapt.optimizer.warmup_steps=1", "distill.steps=3", "distill.batch_size=8",
    "distill.optimizer.warmup_steps=1", "evaluate.linear.c_grid=[1.0]",
    "evaluate.instance.num_queries=50",
    # The same on every machine, whatever `auto` would take there.
    "pretrain.precision=float32", "adapt.precision=float32", "distill.precision=float32",
)  # fmt: skip
STAGES = ["embed", "curate", "pretrain", "adapt", "distill", "evaluate@small", "evaluate@teacher", "register"]
AFTER_DISTILLATION = {"distill", "evaluate@small", "register"}

TRACER = """
import atexit, os, sys

def write():
    if os.path.join("components", "__main__.py") in sys.argv[0]:
        names = [name for name in sys.modules if name.partition(".")[0] == "components"]
        with open(os.path.join(os.path.dirname(__file__), f"{sys.argv[1]}.{os.getpid()}.txt"), "w") as file:
            file.write(" ".join(names))

atexit.register(write)
"""

pytestmark = pytest.mark.stack


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def pedigree(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)


def settings(*values: str) -> list[str]:
    return [part for value in (*SMALL, *values) for part in ("--set", value)]


def run(root: Path, *values: str) -> dict[str, Any]:
    done = pedigree(root, "run", "--json", *settings(*values))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def asked(root: Path, *arguments: str, code: int = 0) -> str:
    """The JSON that a command prints which only looks; in this process, which saves its imports."""
    with chdir(root), mock.patch.dict(os.environ):
        done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, done.output[-3000:]
    return done.stdout


def planned(root: Path, *values: str) -> dict[str, str]:
    told = json.loads(asked(root, "plan", *settings(*values)))
    return {step["stage"]: step["outcome"] for step in told["stages"]}


def computed(result: dict[str, Any]) -> set[str]:
    return {name for name, outcome in result["outcomes"].items() if outcome == "ran"}


def folder(root: Path, result: dict[str, Any]) -> Path:
    return root / ".pedigree" / "runs" / result["run"]


@pytest.fixture(scope="module")
def checkout(servers, tmp_path_factory) -> Path:
    """The code as it is now, committed in a repository of its own."""
    root = tmp_path_factory.mktemp("checkout") / "pedigree"
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file() and not name.startswith(("data/", "tests/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "start")
    return root


@dataclass(frozen=True)
class Interrupted:
    """How a run ended before its time: its code, what it said, and each stage's status in MLflow."""

    code: int
    said: str
    run: str
    in_mlflow: dict[str, str]


def interrupted(root: Path, until: str, hit: Callable[[psutil.Process], None]) -> Interrupted:
    """`pedigree run`, which is hit when it says a line."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", *settings()]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if until in line:
            hit(psutil.Process(process.pid))
            break
    lines += process.stderr
    code = process.wait(60)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("pedigree")
    assert experiment is not None
    newest = client.search_runs([experiment.experiment_id], max_results=1)[0].data.tags["pedigree.run"]
    found = client.search_runs([experiment.experiment_id], f"tags.`pedigree.run` = '{newest}'")
    return Interrupted(
        code, "".join(lines), newest, {run.data.tags["pedigree.stage"]: run.info.status for run in found}
    )


@pytest.fixture(scope="module")
def traced(checkout) -> Iterator[Path]:
    """The folder in which each stage leaves the names of what it has loaded; stages take the threads of a person's."""
    folder = checkout.parent / "traced"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TRACER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield folder


@pytest.fixture(scope="module")
def stopped(checkout, traced) -> Interrupted:
    """The first run, which gets SIGTERM in the middle of pretraining."""
    return interrupted(checkout, "checkpoint after 2 steps", psutil.Process.terminate)


def kill_training(process: psutil.Process) -> None:
    next(child for child in process.children(recursive=True) if "pretrain" in child.cmdline()).kill()


@pytest.fixture(scope="module")
def killed(checkout, stopped) -> Interrupted:
    """The second run, whose training is killed."""
    return interrupted(checkout, "checkpoint after 6 steps", kill_training)


@pytest.fixture(scope="module")
def first(checkout, killed) -> dict[str, Any]:
    """The first run that ends well; it goes on where those before it were."""
    return run(checkout)


def test_a_stopped_run_ends_in_order(checkout, stopped):
    assert stopped.code == 128 + signal.SIGTERM
    assert "Traceback" not in stopped.said
    assert "; start it again to go on" in stopped.said
    assert stopped.said.splitlines()[-1] == "stopped by SIGTERM; what was finished is kept, run again to go on"
    assert stopped.in_mlflow == {"embed": "FINISHED", "curate": "FINISHED", "pretrain": "KILLED", "flow": "KILLED"}
    subjects = git(checkout, "log", "--format=%s", f"main..runs/{stopped.run}").splitlines()
    assert subjects[0] == "Run interrupted: stopped by SIGTERM"
    assert sorted(line.split(":")[0] for line in subjects if ": ran" in line) == ["code", "curate", "embed"]


def test_a_run_whose_training_is_killed_says_so(killed):
    assert killed.code == 1
    assert "Traceback" not in killed.said
    assert "resumed after " in killed.said
    last = killed.said.splitlines()[-1]
    assert last.startswith("error: `python -m components pretrain` failed (killed by SIGKILL)")
    assert killed.in_mlflow == {"pretrain": "KILLED", "flow": "FAILED"}


def test_everything_is_made_and_recorded(checkout, first):
    assert sorted(first["outcomes"]) == sorted(STAGES)
    assert computed(first) == set(STAGES) - {"embed", "curate"}  # which the stopped run had finished
    subjects = git(checkout, "log", "--format=%s", f"main..{first['branch']}").splitlines()
    assert {line.split(":")[0] for line in subjects if ": ran" in line} == computed(first)
    root = folder(checkout, first)
    assert "resumed after " in (checkout / ".pedigree" / "logs" / "runs" / f"{first['run']}.log").read_text()
    assert "up to date" in dvc(root, "status")
    assert git(root, "status", "--porcelain") == ""
    assert git(checkout, "rev-parse", first["branch"]) == first["commit"]
    assert git(checkout, "status", "--porcelain", "--", ":!data") == ""  # a run never touches the checkout
    assert {row["model"] for row in first["metrics"]} == {"teacher", "small", "random", "descriptor"}


def test_what_a_stage_loads_is_on_the_list_of_its_code(checkout, traced, first):
    for stage in {name.partition("@")[0] for name in STAGES}:
        loaded = {name for path in traced.glob(f"{stage}.*.txt") for name in path.read_text().split()}
        assert f"components.{'curation' if stage in ('embed', 'curate') else 'core'}" in loaded
        listed = read_list((folder(checkout, first) / list_of(stage)).read_text())
        assert unlisted(loaded, listed, checkout) == set()


def dvc(root: Path, *arguments: str) -> str:
    """What a `dvc` command prints, with no Prefect in reach."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    command = [BIN / "dvc", *arguments]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_dvc_reads_a_run_as_its_own(checkout, first):
    root = folder(checkout, first)
    assert json.loads(dvc(root, "status", "--cloud", "--json")) == {}  # all of it is on S3
    shown = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"]
    measured = shown["reports/evaluate/small/result.json"]["data"]["knn_top1"]
    assert f"{measured:.4g}" in {row.get("knn_top1") for row in first["metrics"] if row["model"] == "small"}
    assert '"adapt" -> "distill"' in dvc(root, "dag", "--dot")
    assert "up to date" in dvc(root, "repro")
    page = dvc(root, "plots", "show", "-o", str(checkout / ".pedigree" / "plots")).strip()
    page = Path(page.removeprefix("file://"))
    text = page.read_text()
    for plot in ("Pretraining loss", "From pool to curated set", "kept.jpg", "pca.jpg"):
        assert plot in text


def test_what_was_planted_is_found_and_nothing_good_is_lost(checkout, first):
    planted = json.loads((checkout / ".pedigree" / "sample" / "ground_truth.json").read_text())
    kinds: dict[str, int] = {}
    for file in planted["planted"]:
        kinds[file["kind"]] = kinds.get(file["kind"], 0) + 1
    result = json.loads((folder(checkout, first) / "reports/curate/result.json").read_text())
    copies = sum(count for kind, count in kinds.items() if kind in ("re_encoded", "resized"))
    leaks = sum(count for kind, count in kinds.items() if kind.startswith("leak"))
    found = result["rejected"]
    assert (found["near_duplicate"], found["evaluation_copy"]) == (copies, leaks)
    assert found["too_small"] == kinds["tiny"]
    pool = result["images"]["pool"]
    assert result["images"]["deduplicated"] == pool - copies - leaks - kinds["tiny"]


def test_candidates_are_registered_below_one_pipeline_run(first):
    client = MlflowClient()
    for name in ("pedigree-candidates", "pedigree-small-candidates"):
        version = client.get_model_version_by_alias(name, "latest")
        assert first["branch"] in version.tags.values()
        assert "`pedigree promote pedigree" in client.get_registered_model(name).description
    experiment = client.get_experiment_by_name("pedigree")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`pedigree.run` = '{first['run']}'")
    parents = {found.data.tags.get("mlflow.parentRunId") for found in runs}
    # The pipeline's own run, the student's beside its stage's, and those of the two versions.
    assert len(runs) == len(computed(first)) + 4
    (student,) = (found for found in runs if found.info.run_name == f"{first['run']}/distill@small")
    assert student.data.metrics["steps"] == 3
    assert len(parents) == 2  # None of the pipeline's own run, and its id of all stages
    (parent,) = (found for found in runs if found.info.run_id in parents)
    assert "| teacher | random | " in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["pedigree.verdict"].startswith("teacher: pedigree-candidates/")
    assert {"teacher.knn_top1", "small.knn_top1", "teacher.failed_gates"} <= parent.data.metrics.keys()
    assert not [key for found in runs for key in found.data.metrics if key.startswith("last.")]  # curves end so


def test_a_registered_model_gives_the_features_that_were_evaluated(checkout, first, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())  # to which a loaded model adds its own copy of our code
    root = folder(checkout, first)
    config, images = load_recipe(root, None).evaluate, read_evaluation_set(root / "data" / "evaluation")
    reader = ShardReader(images.root)
    places = images.images.select(["shard", "offset", "length"]).to_pylist()
    encoded = [reader.read(**place) for place in places]
    model = mlflow.pyfunc.load_model("models:/pedigree-small-candidates@latest")
    given = model.predict(pd.DataFrame({"image": encoded}))
    crops = EvaluationImages(images, config.preprocessing)
    pixels = torch.stack([crops[index] for index in range(len(crops))])
    with torch.inference_mode():
        student = load_backbone(root / "models" / "students" / "small")
        measured = features(student, to_input(pixels.permute(0, 3, 1, 2)), config.preprocessing).numpy()
    np.testing.assert_allclose(given, measured, rtol=1e-4, atol=1e-4)
    result = json.loads((root / "reports" / "evaluate" / "small" / "result.json").read_text())
    assert images.labels is not None
    scores = knn.evaluate(given, images.labels, config.knn).metrics
    assert scores == {key: result[key] for key in scores}


def test_prefect_shows_tables_and_pictures(first):
    from infra.local.services import request

    url = os.environ["PREFECT_API_URL"].removesuffix("/api")
    found = request(url, "/api/artifacts/latest/filter", os.environ["PREFECT_API_AUTH_STRING"], "POST", {})
    shown = {artifact["key"]: artifact["data"] for artifact in found}
    assert not any("(file:" in str(data) for data in shown.values())  # a link that browsers do not follow
    steps = [row["stage"] for row in json.loads(shown["funnel"])]
    assert steps == ["pool", "filtered", "decontaminated", "deduplicated", "curated"]
    assert {"teacher", "small", "random"} <= {row["model"] for row in json.loads(shown["metrics"])}
    for key in ("sample-kept", "sample-removed", "training-crops", "pca-teacher", "pca-small"):
        encoded = shown[key].partition("data:image/jpeg;base64,")[2].removesuffix(")")
        assert base64.b64decode(encoded, validate=True).startswith(b"\xff\xd8")  # a JPEG
    assert first["mlflow"] in shown["mlflow"]
    assert "/data-docs/curated/index.html" in shown["data-docs"]
    assert "/reports/curate/report.html" in shown["curation-report"]
    named = {"flow_runs": {"name": {"any_": [first["run"]]}}}
    assert len(request(url, "/api/flow_runs/filter", os.environ["PREFECT_API_AUTH_STRING"], "POST", named)) == 1


def test_an_unchanged_run_computes_nothing(checkout, first):
    assert planned(checkout) == dict.fromkeys(STAGES, "unchanged")
    begun = time.monotonic()
    again = run(checkout)
    assert computed(again) == set()
    assert again["metrics"] == first["metrics"]
    locks = [(folder(checkout, result) / "dvc.lock").read_text() for result in (first, again)]
    assert yaml.safe_load(locks[0]) == yaml.safe_load(locks[1])
    assert time.monotonic() - begun < 120  # 15 s measured; not a benchmark, a stage that ran would take longer


def test_promotion_and_trace(checkout, first):
    shown = json.loads(asked(checkout, "review", "pedigree@latest", code=1))
    gates = {gate["name"]: gate["state"] for gate in shown["gates"]}
    assert gates.pop("random") == "failed"  # of so few steps nothing else can be expected
    assert set(gates.values()) == {"passed"}
    words = ["promote", "pedigree@latest", "--reason", "the first one"]
    refused = pedigree(checkout, *words)
    assert refused.returncode == 1
    assert "does not pass 1 of 12 gates: random: knn_top1" in refused.stderr
    done = pedigree(checkout, *words, "--waive", "random=of 3 steps nothing can be expected")
    assert done.returncode == 0, done.stderr
    text = json.dumps(json.loads(asked(checkout, "trace", "pedigree@champion")))
    for fact in ("the first one", "CC0-1.0", "python -m components pretrain", "data/pool/sample/"):
        assert fact in text


def test_a_parameter_and_a_champion_change_only_what_follows_them(checkout, first):
    told = planned(checkout, "distill.steps=4")
    changed = run(checkout, "distill.steps=4")
    assert computed(changed) == AFTER_DISTILLATION | {"evaluate@teacher"}  # which measures the champion too
    assert computed(changed) == {name for name, outcome in told.items() if outcome in ("run", "after")}
    assert "champion" in {row["model"] for row in changed["metrics"] if row["evaluation"] == "teacher"}
    difference = json.loads(dvc(folder(checkout, changed), "params", "diff", "--json", first["branch"]))
    assert difference["params.yaml"].pop("distill.steps") == {"old": 3, "new": 4, "diff": 1}
    assert difference == {"params.yaml": {"evaluate.champions.teacher": {"old": None, "new": "models:/pedigree/1"}}}
    # With DVC alone, as an auditor does it: the changed stages, computed again from the run's own branch.
    auditor = checkout / ".pedigree" / "auditor"
    git(checkout, "worktree", "add", "-q", "--detach", str(auditor), changed["branch"])
    dvc(auditor, "pull")
    dvc(auditor, "repro", "--force", "--single-item", "distill")
    for name in ("model.safetensors", "heads.safetensors", "config.json"):
        made = [root / "models/students/small" / name for root in (auditor, folder(checkout, changed))]
        assert made[0].read_bytes() == made[1].read_bytes()


def test_all_data_comes_back_from_s3(checkout, first):
    root = folder(checkout, first)
    kept = {p: hashlib.sha256(p.read_bytes()).digest() for p in root.glob("models/**/*") if p.is_file()}
    kept |= {p: hashlib.sha256(p.read_bytes()).digest() for p in root.glob("data/**/*") if p.is_file()}
    assert len(kept) > 10
    shutil.rmtree(checkout / ".dvc" / "cache")
    for path in kept:
        if not path.name.endswith((".dvc", SUFFIX)):  # these are git's
            path.unlink()
    # DVC by itself notices a changed byte, since its remote says `verify = true`; nothing of it stays here.
    record, s3 = Record(root), s3_client()
    remote = Remote(record.remote_url())
    weights = remote.address(remote.listing(record.output("models/pretrained") or "")["model.safetensors"])
    bucket, key = split_s3_uri(weights)
    data = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.put_object(Bucket=bucket, Key=key, Body=data[:-1] + bytes([data[-1] ^ 1]))
    refused = subprocess.run([BIN / "dvc", "pull"], cwd=root, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "pretrained" in refused.stderr
    assert not (root / "models/pretrained/model.safetensors").exists()
    s3.put_object(Bucket=bucket, Key=key, Body=data)
    subprocess.run([BIN / "dvc", "pull"], cwd=root, capture_output=True, check=True)
    assert {p: hashlib.sha256(p.read_bytes()).digest() for p in kept} == kept
