"""Runs of two short stages: real git, DVC, S3 and MLflow, with shell commands for the stages; nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import yaml

from components.core.git import git
from components.data.manifest import POOL_SCHEMA, write_manifest
from components.lineage.ledger import Ledger, Outcome
from components.lineage.provenance import Tag, collect_origin
from components.recipe import Recipe, load_recipe
from flows.workspace import Workspace, open_workspace
from tests.flows.repository import PROJECT

SEED = "$(grep ^seed params.yaml | cut -c 7-)"
STAGES = {
    "curate": {
        "cmd": "mkdir -p data/curated reports/curate && cp data/pool/photos/ab12/manifest.parquet data/curated/ && "
        f"sh -c '(cat data/pool/photos/ab12/00000.tar && seq {SEED} 30000) > data/curated/00000.tar' && "
        f"echo {SEED} > reports/curate/result.json",
        "deps": ["data/pool", "components/curation"],
        "params": ["seed"],
        "outs": ["data/curated"],
        "metrics": [{"reports/curate/result.json": {"cache": False}}],
    },
    "adapt": {
        "cmd": "mkdir -p models/adapted && tac data/curated/00000.tar > models/adapted/model.safetensors",
        "deps": ["data/curated"],
        "outs": ["models/adapted"],
    },
}


@dataclass
class ShortRuns:
    """A repository and its runs; each is named by its place in the order, so that equal seconds do not matter."""

    root: Path
    name: str
    recipe: Recipe
    works: list[Workspace] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.root / ".dvc" / "cache"

    @contextmanager
    def going(self, seed: int) -> Iterator[Workspace]:
        """A run that has begun and brought its data."""
        recipe = self.recipe.model_copy(update={"seed": seed, "name": self.name})
        with open_workspace(self.root, recipe, ["photos/ab12"]) as work:
            work.ledger.bring_data()
            work.ledger.fetch_run_cache()
            yield work

    def run(
        self, seed: int, register: bool = False, ending: str = "Run finished", until: str | None = None
    ) -> Workspace:
        """A whole run; `until` names the stage that it does not come to."""
        with self.going(seed) as work:
            for name, stage in STAGES.items():
                if name == until:
                    break
                do_stage(work, name, stage["cmd"])
            else:
                if register:
                    register_version(work)
                    git(work.root, "add", "--force", "reports/register/result.json")  # no stage of these runs makes it
                work.commit("register: ran for 0 s" if register else "register: restored")
            if ending:
                git(work.root, "commit", "--quiet", "--allow-empty", "--message", ending)
        return work


def do_stage(work: Workspace, name: str, command: str) -> str:
    """What flows.stages does, without Prefect; returns how the stage's outputs came."""
    outcome = work.ledger.take_up(name)
    if outcome is Outcome.CHANGED:
        subprocess.run(command, shell=True, cwd=work.root, check=True)
        work.ledger.record(name)
    work.commit(f"{name}: ran for 0 s" if outcome is Outcome.CHANGED else f"{name}: {outcome.value}")
    return "ran" if outcome is Outcome.CHANGED else outcome.value


def register_version(work: Workspace) -> None:
    """Register the run's weights with the tags that registry/publish.py writes."""
    from mlflow import MlflowClient

    client = MlflowClient()
    name = f"{json_name(work)}-candidates"
    tags = collect_origin(work.root, "models/adapted").tags()
    tags |= {Tag.PARENT: "models/pretrained", Tag.PARENT_SHA256: "0" * 64, Tag.DIGEST: "d1", Tag.VALIDATION: "passed"}
    client.create_registered_model(name)
    run = open_mlflow_run(work, "register", "FINISHED")
    version = client.create_model_version(name, "s3://elsewhere/m-1", run, tags=tags, await_creation_for=0)
    write_result(work.root, name, version.version)


def write_result(root: Path, name: str, version: object) -> None:
    """What the register stage writes."""
    result = root / "reports/register/result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"teacher": {"name": name, "version": str(version)}}))


def open_mlflow_run(work: Workspace, stage: str, status: str) -> str:
    """An MLflow run of a stage of a run, ended with this status and with a file of 10 kB."""
    from mlflow import MlflowClient

    client, name = MlflowClient(), json_name(work)
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    tags = {"pedigree.run": work.run_id, "pedigree.stage": stage, "mlflow.user": "tess"}
    tags["pedigree.commit"] = git(work.root, "rev-parse", "HEAD")
    run = client.create_run(experiment, run_name=f"{work.run_id}/{stage}", tags=tags).info.run_id
    client.log_text(run, "x" * 10_000, "pictures/picture.txt")
    client.set_terminated(run, status)
    return run


def json_name(work: Workspace) -> str:
    return load_recipe(work.root, None).name


def make_short_runs(folder: Path) -> ShortRuns:
    """A repository with its remote below a prefix of its own in the bucket of the running stack."""
    root, name = folder / "main", f"upkeep-{uuid.uuid4().hex[:8]}"
    snapshot = root / "data/pool/photos/ab12"
    snapshot.mkdir(parents=True)
    _write_manifest(snapshot / "manifest.parquet")
    (snapshot / "00000.tar").write_text(f"not really a tar, and unlike that of any other repository: {name}")
    (root / "components/curation").mkdir(parents=True)
    (root / "components/curation/stage.py").write_text("# code\n")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (root / ".gitignore").write_text((PROJECT / ".gitignore").read_text())
    recipe = load_recipe(PROJECT, "tiny-cpu")
    (root / "params.yaml").write_text("seed: 0\n")
    url = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{name}"
    sh(root, "git", "init", "-q", "-b", "main")
    (root / ".dvc").mkdir()
    (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    remote = f"[core]\n    remote = s\n    analytics = false\n['remote \"s\"']\n    url = {url}\n"
    (root / ".dvc/config").write_text(f'{remote}[cache]\n    type = "hardlink,copy"\n')
    (root / ".dvc/config.local").write_text(f"['remote \"s\"']\n    endpointurl = {os.environ['AWS_ENDPOINT_URL']}\n")
    Ledger(root).track(snapshot)
    for command in ("config user.name Test", "config user.email t@localhost", "add -A", "commit -q -m start"):
        sh(root, "git", *command.split())
    return ShortRuns(root, name, recipe)


def sh(root: Path, *command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _write_manifest(path: Path) -> None:
    row = {"image_id": "0" * 64, "shard": "00000.tar", "offset": 0, "length": 1, "format": "PNG", "width": 1}
    row |= {"height": 1, "source": "photos", "source_uri": "file://0", "license": "CC0-1.0"}
    rows = [row | {"label": None, "split": None}]
    write_manifest(pa.Table.from_pylist(rows, schema=POOL_SCHEMA), path)
