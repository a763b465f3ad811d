"""`pedigree takedown` on real repositories: what is withdrawn, what is told, and what a kill leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import skimage.data
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from components.core.git import git
from components.data.ingest import IngestReport, ingest
from components.data.ingest_config import IngestRequest
from components.data.manifest import read_collection
from components.lineage import takedown as steps
from components.lineage.audit_log import PLATFORM, AuditLog
from components.lineage.ledger import Ledger
from components.lineage.lock_file import Record
from components.lineage.provenance import Tag
from components.registry.withdrawals import open_takedown
from flows import takedown as flow
from flows.cli import app
from infra.local import supervisor
from tests.flows.repository import PROJECT, git_lines
from tests.lineage.short_runs import make_short_runs

PHOTO = np.asarray(skimage.data.astronaut())


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO[number * 16 : number * 16 + 64, number * 20 : number * 20 + 72]).save(buffer, "JPEG")
    return buffer.getvalue()


def take(root: Path, name: str, license_: str, **options: Any) -> IngestReport:
    values = {"source": str(root.parent / name), "name": name, "license": license_, "workers": 1, **options}
    return ingest(IngestRequest.parse(**values))


CONFIG = """[core]
    remote = s
['remote "s"']
    url = s3://{bucket}/{name}
    endpointurl = {endpoint}
[cache]
    type = "hardlink,copy"
"""


@pytest.fixture(scope="module")
def template(storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two sources in its pool, one image in both of them, and its own prefix on the remote."""
    folder = tmp_path_factory.mktemp("takedown")
    root, name = folder / "main", f"takedown-{uuid.uuid4().hex[:8]}"
    (root / ".dvc").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text((PROJECT / ".gitignore").read_text())
    values = {"bucket": os.environ["PEDIGREE_DATA_BUCKET"], "endpoint": os.environ["AWS_ENDPOINT_URL"], "name": name}
    (root / ".dvc/config").write_text(CONFIG.format(**values))
    (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    for command in ("init -q -b main", "config user.name Ann", "config user.email ann@localhost"):
        git_lines(root, *command.split())
    for source, numbers in (("one", range(8)), ("two", range(7, 10))):
        (folder / source).mkdir()
        for number in numbers:
            (folder / source / f"{number}.jpg").write_bytes(picture(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for report in (take(root, "one", "CC0-1.0", holdout=0.3), take(root, "two", "CC-BY-4.0")):
            for path in filter(None, (report.pool_snapshot, report.evaluation_snapshot)):
                Ledger(root).track(path)
    git_lines(root, "add", "-A")
    git_lines(root, "commit", "-q", "-m", "start")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with an audit bucket of its own; there is neither MLflow nor Prefect."""
    shutil.copytree(template, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "main")
    monkeypatch.setenv("PEDIGREE_AUDIT_BUCKET", f"audit-{uuid.uuid4().hex[:8]}")
    boto3.client("s3").create_bucket(Bucket=os.environ["PEDIGREE_AUDIT_BUCKET"], ObjectLockEnabledForBucket=True)
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(supervisor, "connect", lambda *_, **__: {})  # S3 is there already
    return tmp_path / "main"


def takedown(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["takedown", "--json", *arguments])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["takedown", *arguments])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def ids(root: Path, *collections: str) -> set[str]:
    tables = [read_collection(root / "data" / name) for name in collections or ("pool", "evaluation")]
    return {id_ for table in tables for id_ in table["image_id"].to_pylist()}


def killed_after(module: object, name: str, root: Path, intent: steps.Takedown) -> None:
    """Carry out a takedown in another process, which is killed when this function has ended."""
    child = os.fork()
    if child == 0:
        original: Callable[..., Any] = getattr(module, name)

        def last(*arguments: Any, **named: Any) -> None:
            original(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, last)
        try:
            flow.carry_out(root, intent)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), name
    assert os.WTERMSIG(status) == signal.SIGKILL, name


@pytest.mark.stack
def test_an_image_is_withdrawn_from_all_sources_and_never_comes_back(project: Path):
    wanted = sha256(picture(7)).hexdigest()  # in both sources
    (project / "notes.txt").write_text("of somebody else\n")
    git_lines(project, "add", "notes.txt")
    assert "no terminal to ask on: look at it there first, or give --yes" in refused("--image", wanted, "--reason", "r")
    before, everything = steps.dvc_ids(project), ids(project)
    found = takedown("--image", str(project.parent / "two/7.jpg"), "--reason", "consent withdrawn", "--yes")
    assert found["impact"]["images"] == [wanted]
    assert found["impact"]["sources"] == {"one": 1, "two": 1}
    assert "no registry was searched" in found["impact"]["unknown"][0]
    assert found["retraining"].startswith("no retraining starts: PREFECT_API_URL is not set")
    assert ids(project) == everything - {wanted}
    after = steps.dvc_ids(project)
    assert set(before) - set(after) == set(found["snapshots"])
    assert set(after) - set(before) == set(found["snapshots"].values())
    assert len(found["snapshots"]) == 2
    # The commit has the tombstone and the snapshots alone; what somebody else has staged is staged still.
    stone = f"data/withdrawn/{found['id']}.json"
    assert json.loads(git(project, "show", f"HEAD:{stone}"))["images"] == [wanted]
    changed = git_lines(project, "show", "--name-only", "--format=", "HEAD")
    assert stone in changed
    assert {path.split("/")[1] for path in changed} <= {"pool", "evaluation", "withdrawn"}
    assert git_lines(project, "status", "--porcelain", "--untracked-files=all") == ["A  notes.txt"]
    assert set(Record(project, "HEAD").tracked("data")) == set(after)
    (event,) = AuditLog.from_environment().read(PLATFORM)
    assert (event.action, event.subject, event.actor) == ("takedown", found["id"], "Ann <ann@localhost>")
    assert event.details["snapshots"] == {path: before[path] for path in found["snapshots"]}
    assert steps.unfinished(project) == []
    # A later ingest refuses it, and stores nothing again; the same takedown again changes nothing.
    assert take(project, "two", "CC-BY-4.0").rejected == {"withdrawn": 1}
    commit = git(project, "rev-parse", "HEAD")
    again = takedown("--image", wanted, "--reason", "consent withdrawn", "--yes")
    assert (again["id"], again["snapshots"], again["commit"]) == (found["id"], {}, commit)
    assert len(AuditLog.from_environment().read(PLATFORM)) == 1


@pytest.mark.stack
def test_a_takedown_that_is_killed_at_each_step_is_finished_by_the_next(project: Path):
    everything, two = ids(project), ids(project, "pool") - {sha256(picture(n)).hexdigest() for n in range(7)}
    intent = steps.Takedown(
        id=steps.takedown_id(two, "r"), reason="r", asked="source two", at="2026-11-30T00:00:00Z", by="Ann",
        actor_from="test", images=tuple(sorted(two)),
        snapshots={path: "" for path in steps.dvc_ids(project) if steps.image_bytes(project / path, two)},
    )  # fmt: skip
    assert len(intent.snapshots) == 2
    intent.save(project)
    points = [(steps, "record"), (steps, "bury"), (steps, "rebuild"), (steps.Ledger, "track"), (steps, "_remove")]
    for module, name in [*points, (steps, "commit"), (flow, "_retrain")]:
        (left,) = steps.unfinished(project)
        killed_after(module, name, project, left)
    # Without any option, the command finishes what was cut short.
    (done,) = takedown()["finished"]
    assert done["id"] == intent.id
    assert ids(project) == everything - two
    assert sorted(map(bool, done["snapshots"].values())) == [False, True]  # all of source two is gone
    assert git_lines(project, "status", "--porcelain", "--untracked-files=all") == []
    assert set(Record(project, "HEAD").tracked("data")) == set(steps.dvc_ids(project))
    assert len(AuditLog.from_environment().read(PLATFORM)) == 1
    assert len(git_lines(project, "log", "--format=%s", "--grep", "^Withdraw")) == 1
    assert steps.unfinished(project) == []
    assert "give one of --image, --source, --license, --file, and --reason TEXT; given: none" in refused()


@pytest.mark.stack
def test_what_cannot_be_meant_is_refused_before_anything_is_changed(project: Path):
    (project.parent / "text.jpg").write_text("no image")
    (project.parent / "list.csv").write_text("file\na\n")
    told = ["--reason", "r", "--yes"]
    assert "source three: no data version has images of it; the checkout has one, two" in refused(
        "--source", "three", *told
    )
    assert "not an image" in refused("--image", str(project.parent / "text.jpg"), *told)
    assert "expected an image file, or an image id of 64 hexadecimal digits" in refused("--image", "abc", *told)
    assert "no rows below a header with the column `image`" in refused(
        "--file", str(project.parent / "list.csv"), *told
    )
    assert "give one of" in refused("--source", "one", "--license", "CC0-1.0", *told)
    assert "and --reason TEXT" in refused("--source", "one", "--yes")
    assert AuditLog.from_environment().read(PLATFORM) == []
    assert steps.unfinished(project) == []


@pytest.mark.stack
def test_models_that_learned_an_image_are_flagged_and_their_gate_fails(storage, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    runs = make_short_runs(tmp_path)
    monkeypatch.chdir(runs.root)
    monkeypatch.setenv("PEDIGREE_AUDIT_BUCKET", f"{runs.name}-audit")
    monkeypatch.setattr(supervisor, "connect", lambda *_, **__: {})
    boto3.client("s3").create_bucket(Bucket=f"{runs.name}-audit", ObjectLockEnabledForBucket=True)
    runs.run(1, register=True)
    candidate = f"{runs.name}-candidates/1"
    image, told = "0" * 64, ["--reason", "court order", "--yes"]
    found = takedown("--image", image, "--no-retrain", *told)
    assert list(found["models"]) == list(found["impact"]["learned"]) == [candidate]
    assert list(found["snapshots"].values()) == [None]  # it was the only image
    client = MlflowClient()
    version = client.get_model_version(*candidate.split("/"))
    assert version.tags[Tag.TAKEDOWN] == f"{found['id']}: court order"
    (event,) = AuditLog.from_environment().read(runs.name)
    assert (event.action, event.subject) == ("takedown", candidate)
    assert takedown("--image", image, *told)["id"] == found["id"]
    assert len(AuditLog.from_environment().read(runs.name)) == 1
    # The gate goes by the audit log, not by the tag, which anyone can delete; without an event, by the images.
    reason = open_takedown(version, [event], {candidate}, runs.root)
    assert reason.startswith(f"{found['id']} on ")
    assert reason.endswith(": court order")
    assert "trained on it" in reason
    assert open_takedown(version, [], {candidate}, runs.root).startswith("1 images of its training set were withdrawn")
