"""One small project, registered and promoted for real: git, DVC on S3, MLflow, a signed release, an audit event."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import yaml
from mlflow import MlflowClient

from components.core.git import git
from components.core.stage_runs import close_parent, open_parent, stage_run
from components.lineage.ledger import Ledger
from components.registry import stage
from components.registry.promote import promote
from flows.workspace import close_branch
from tests.flows.repository import PROJECT
from tests.registry import conftest as made

RUN = "20261130-040000-abcd"
POOL, EVALUATION = "data/pool/photos/ab12", "data/evaluation/photos/cd34"
METRICS = ["reports/evaluate/{}/result.json"]


def stages() -> dict[str, Any]:
    """The project's DAG, with the outputs that a short run has."""
    evaluated = {"teacher": "models/adapted", "small": "models/students/small"}
    return {
        "embed": {
            "cmd": "true", "deps": ["data/pool", "data/evaluation", "components/code.py"], "outs": ["data/embeddings"],
        },
        "curate": {
            "cmd": "true", "deps": ["data/pool", "data/evaluation", "data/embeddings"], "params": ["seed"],
            "outs": ["data/curated", "reports/curate/report.html"],
            "metrics": [{"reports/curate/result.json": {"cache": False}}],
        },
        "pretrain": {"cmd": "true", "deps": ["data/curated"], "outs": ["models/pretrained"]},
        "adapt": {"cmd": "true", "deps": ["data/curated", "models/pretrained"], "outs": ["models/adapted"]},
        "distill": {"cmd": "true", "deps": ["models/adapted"], "outs": ["models/students"]},
        "evaluate": {
            "foreach": evaluated,
            "do": {
                "cmd": "true", "deps": ["data/evaluation", "${item}"],
                "outs": ["reports/evaluate/${key}/report.html", "reports/evaluate/${key}/by_image.parquet"],
                "metrics": [{"reports/evaluate/${key}/result.json": {"cache": False}}],
            },
        },
        "register": {
            "cmd": "true", "deps": ["models/adapted", "models/students", "reports/evaluate"],
            "outs": [{"reports/register/result.json": {"cache": False}}],
        },
    }  # fmt: skip


@dataclass
class Project:
    """The project, and clients to change what is stored of it."""

    root: Path
    name: str
    s3: Any = field(default_factory=lambda: boto3.client("s3"))
    mlflow: MlflowClient = field(default_factory=MlflowClient)

    @property
    def champion(self) -> Any:
        return self.mlflow.get_model_version_by_alias(self.name, "champion")

    def candidate(self, name: str = "") -> Any:
        return self.mlflow.get_model_version(f"{self.name}{name}-candidates", "1")

    def dvc_object(self, path: str, inner: str | None = None) -> str:
        """Address of what DVC keeps of a path, or of a file in a folder; of a folder itself, its listing."""
        files = [self.root / "dvc.lock", *self.root.glob("data/*/*/*.dvc")]
        outs = [out for file in files for out in _outs(file) if out["path"] in (path, Path(path).name)]
        address = self._address(outs[0]["md5"])
        if inner is None:
            return address
        listing = json.loads(self.get(address))
        return self._address(next(item["md5"] for item in listing if item["relpath"] == inner))

    def _address(self, id_: str) -> str:
        return f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{self.name}/files/md5/{id_[:2]}/{id_[2:]}"

    def get(self, address: str) -> bytes:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def put(self, address: str, data: bytes) -> None:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        self.s3.put_object(Bucket=bucket, Key=key, Body=data)

    def delete(self, address: str) -> None:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        self.s3.delete_object(Bucket=bucket, Key=key)


def make_project(folder: Path) -> Project:
    """Make the project, run its stages as the flow does, register both models and promote the teacher."""
    project = Project(folder / "main", f"tampered-{uuid.uuid4().hex[:8]}")
    root = project.root
    _start(project)
    git(root, "checkout", "-q", "-b", f"runs/{RUN}")
    commit(root, f"Run {RUN}")
    parent = open_parent(RUN, project.name, {"name": project.name})
    _outputs(root)
    ledger = Ledger(root)
    for name in ("embed", "curate", "pretrain", "adapt", "distill", "evaluate@teacher", "evaluate@small"):
        _record(project, ledger, name)
    with stage_run("register", None, {"name": project.name}, root) as tracked:
        os.environ["MLFLOW_RUN_ID"] = str(tracked.run_id)  # as the command line of a stage does
        result = stage.run(made.CONFIG, root, 7, project.name)
        (root / "reports/register").mkdir()
        (root / "reports/register/result.json").write_text(json.dumps(result))
    ledger.record("register")
    commit(root, "register: ran for 1 s")
    close_branch(root, "Run finished")
    close_parent(parent, "FINISHED")
    promote(f"{project.name}@latest", "good", root, actor="Rita")
    return project


def commit(root: Path, subject: str) -> None:
    git(root, "add", "--all")
    git(root, "commit", "-q", "--allow-empty", "-m", subject)


def _start(project: Project) -> None:
    """A repository with a pool and an evaluation set, whose remote has a prefix of its own."""
    root = project.root
    made.write_data(root / POOL, curated=False)
    (root / POOL / "summary.html").write_text("<!doctype html>")
    (root / POOL / "rejected.parquet").write_bytes(b"not read here")
    made.write_data(root / EVALUATION, curated=False)
    (root / ".gitignore").write_text((PROJECT / ".gitignore").read_text())
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages()}, sort_keys=False))
    params = {"name": project.name, "seed": 7, "adapt": {"steps": 8}, "distill": {"students": {"small": {"dim": 16}}}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "components").mkdir()
    (root / "components/code.py").write_text("# code\n")
    (root / ".dvc").mkdir()
    (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    url = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{project.name}"
    remote = f"['remote \"s\"']\n    url = {url}\n    verify = true\n"
    (root / ".dvc/config").write_text(f"[core]\n    remote = s\n    analytics = false\n{remote}")
    (root / ".dvc/config.local").write_text(f"['remote \"s\"']\n    endpointurl = {os.environ['AWS_ENDPOINT_URL']}\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "Test")
    git(root, "config", "user.email", "test@localhost")
    for snapshot in (POOL, EVALUATION):
        Ledger(root).track(root / snapshot)
    commit(root, "start")


def _outputs(root: Path) -> None:
    (root / "data/embeddings").mkdir()
    (root / "data/embeddings/pool.npy").write_bytes(b"embeddings")
    made.write_data(root / "data/curated", curated=True)
    (root / "data/curated/rejected.parquet").write_bytes(b"not read here")
    made.weights(root / "models/pretrained", 1, 32)
    made.weights(root / "models/adapted", 2, 32)
    made.weights(root / "models/students/small", 3, 16)
    for item, top1 in (("teacher", 0.75), ("small", 0.5)):
        made.write_report(root, item, top1)
        (root / f"reports/evaluate/{item}/report.html").write_text(f"<!doctype html>{item}")
    (root / "reports/curate").mkdir()
    (root / "reports/curate/report.html").write_text("<!doctype html>")
    (root / "reports/curate/result.json").write_text(json.dumps({"origins": {}, "rejected": {}, "images": {"pool": 3}}))
    (root / "reports/curate/funnel.csv").write_text("stage,images\npool,3\n")


def _record(project: Project, ledger: Ledger, name: str) -> None:
    """What flows.stages does with a stage that ran; evaluation and curation also have a run in MLflow."""
    stage_name, _, item = name.partition("@")
    result = project.root / "reports" / stage_name / item / "result.json"
    if result.exists():
        with stage_run(stage_name, item or None, {"name": project.name}, project.root) as tracked:
            tracked.log_result(json.loads(result.read_text()))
    ledger.record(name)
    commit(project.root, f"{name}: ran for 1 s")


def _outs(file: Path) -> list[dict[str, str]]:
    found = yaml.safe_load(file.read_text())
    entries = found["stages"].values() if "stages" in found else [found]
    return [out for entry in entries for out in entry.get("outs", [])]
