"""`pedigree takedown` on real repositories: what is withdrawn, what is told, and what a kill leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from components.core.git import git
from components.core.pictures import Tile, draw_sheet, fit, in_columns, jpeg
from components.core.storage import sha256_file, split_s3_uri, write_bytes, write_json
from components.data.ingest import IngestReport, ingest
from components.data.ingest_config import IngestRequest
from components.data.manifest import CURATED_SCHEMA, read_collection, write_manifest
from components.data.shards import ShardReader, ShardWriter
from components.lineage import takedown as steps
from components.lineage.audit_log import PLATFORM, AuditLog
from components.lineage.ledger import Ledger
from components.lineage.lock_file import Record, file_md5
from components.lineage.provenance import Tag
from components.recipe import load_recipe
from components.registry.withdrawals import open_takedown
from flows import purge as flow_purge
from flows import takedown as flow
from flows.cli import app
from flows.health import takedowns
from flows.purge import ANY_GARBAGE
from flows.workspace import Workspace, open_workspace
from infra.local import supervisor
from infra.local.compaction import compact_storage
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


STAGES = """stages:
  embed:
    cmd: "true"
    deps: [data/pool]
    outs: [data/embeddings]
  curate:
    cmd: "true"
    deps: [data/pool, data/embeddings]
    outs: [data/curated, reports/curate/report.html, reports/curate/kept.jpg]
"""


def do_stages(work: Workspace) -> bytes:
    """Write what `embed` and `curate` write of the pool, and record it; return the sheet of the kept images."""
    work.ledger.bring_data()
    root, pool = work.root, read_collection(work.root / "data/pool")
    (root / "data/embeddings/scores").mkdir(parents=True)
    np.save(root / "data/embeddings/pool.npy", np.ones((len(pool), 4), np.float32))
    pq.write_table(pool.select(["image_id"]), root / "data/embeddings/scores/pool.parquet")
    work.ledger.record("embed")
    (root / "data/curated").mkdir()
    pictures, rows = {}, []
    reader = ShardReader(root / "data/pool")
    for row in pool.to_pylist():
        pictures[row["image_id"]] = row | {"data": reader.read(row["shard"], row["offset"], row["length"])}
    with ShardWriter(root / "data/curated", 2**20) as shards:
        for id_, row in sorted(pictures.items()):
            shard, offset, _ = shards.add(id_, "jpg", row.pop("data"))
            empty = dict.fromkeys(("derived_from", "seed_set", "query_id", "similarity", "cluster_path"))
            empty |= dict.fromkeys(("gray_share", "entropy", "nsfw", "num_faces"))
            rows.append(row | {"shard": shard, "offset": offset, "origin": "balanced", "group_id": id_} | empty)
    write_manifest(pa.Table.from_pylist(rows, schema=CURATED_SCHEMA), root / "data/curated/manifest.parquet")
    tiles = [
        Tile(fit(Image.open(io.BytesIO(reader.read(r["shard"], r["offset"], r["length"]))))) for r in pool.to_pylist()
    ]
    sheet = jpeg(draw_sheet(in_columns(tiles, 4)))
    (root / "reports/curate").mkdir(parents=True, exist_ok=True)
    (root / "reports/curate/kept.jpg").write_bytes(sheet)
    (root / "reports/curate/report.html").write_text(f"<img src='data:image/jpeg;base64,{b64encode(sheet).decode()}'>")
    work.ledger.record("curate")
    work.commit("curate: ran for 0 s")
    git(work.root, "commit", "-q", "--allow-empty", "-m", "Run finished")
    return sheet


def everything_stored(root: Path) -> Iterator[tuple[str, bytes]]:
    """All files below a folder, and all versions of all objects of its remote."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
    s3, (bucket, prefix) = boto3.client("s3"), split_s3_uri(str(Record(root).remote_url()))
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Versions", ()):
            key, version = item["Key"], item["VersionId"]
            yield f"{key} {version}", s3.get_object(Bucket=bucket, Key=key, VersionId=version)["Body"].read()


def holding(root: Path, *wanted: bytes) -> list[str]:
    return [name for name, data in everything_stored(root) if any(each in data for each in wanted)]


@pytest.mark.stack
def test_a_purge_leaves_the_bytes_nowhere_even_if_it_is_killed(project: Path, storage, monkeypatch):
    (project / "dvc.yaml").write_text(STAGES)
    recipe = load_recipe(PROJECT, "tiny-cpu").model_copy(update={"name": "purged"})
    with open_workspace(project, recipe, [p.removeprefix("data/pool/") for p in steps.dvc_ids(project)]) as work:
        sheet = do_stages(work)
    image = picture(8)
    wanted, (start, end) = sha256(image).hexdigest(), (len(image) // 2 - 20, len(image) // 2 + 20)
    marks = (image[start:end], sheet[len(sheet) // 2 :][:40], b64encode(sheet)[4000:4060])
    # What else lies about: an old version of an object, a fetched block, a stopped training, the sample, a lost copy.
    s3, (bucket, prefix) = boto3.client("s3"), split_s3_uri(str(Record(project).remote_url()))
    snapshot = next(path for path in steps.dvc_ids(project) if steps.image_bytes(project / path, [wanted]))
    md5 = file_md5(project / snapshot / "00000.tar")
    key = f"{prefix}/files/md5/{md5[:2]}/{md5[2:]}"
    s3.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": key}, MetadataDirective="REPLACE")
    s3.delete_object(Bucket=bucket, Key=key)
    state = project / ".pedigree"
    training = {"dataset_sha256": sha256_file(work.root / "data/curated/manifest.parquet"), "stage": "pretrain"}
    write_json(state / "checkpoints/k1/config.json", training)
    write_json(state / "checkpoints/k2/config.json", training | {"dataset_sha256": "0" * 64})
    for name in ("checkpoints/k1/diverged_step_3/rank_0.safetensors", "cache/shards/0-0", "sample/pool/8.jpg"):
        write_bytes(state / name, b"before" + image + b"after")
    write_bytes(state / "cache/tokens/0/cls.npy", b"of evaluation images")
    write_bytes(work.root / "reports/lost.html", b"<img src='data:image/jpeg;base64," + b64encode(image) + b"'>")
    assert len(holding(project, *marks)) > 10

    arguments = ["--image", wanted, "--reason", "court order", "--purge", "--yes"]
    with monkeypatch.context() as patch:
        patch.setattr(flow_purge.steps, "prove", lambda *_: os._exit(9))  # after all was removed
        child = os.fork()
        if child == 0:
            CliRunner().invoke(app, ["takedown", *arguments])
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert "takedown" in {finding.check for finding in takedowns(project)}
    (done,) = takedown()["finished"]
    assert done["purged"]["left"] == []
    assert done["purged"]["removed"]["copies found by the search"] == 2  # in the sample and in the run's folder
    assert holding(project, *marks) == []
    assert list(takedowns(project)) == []
    assert not (state / "checkpoints/k1").exists()
    assert not (state / "cache/tokens/0").exists()
    assert (state / "checkpoints/k2").exists()
    assert (work.root / "data/curated/manifest.parquet").exists()
    assert not (work.root / "data/curated/00000.tar").exists()
    # The server's own files have them no more either, once it has overwritten what was deleted.
    compact_storage(storage.root, ANY_GARBAGE)
    volumes = [path for path in (storage.root / ".pedigree").rglob("*.dat") if path.is_file()]
    assert volumes
    assert not [path for path in volumes if any(mark in path.read_bytes() for mark in marks)]
    # What is left is whole: other images, and the versions without this one.
    shutil.rmtree(project / ".dvc/cache")
    assert Ledger(project).bring_data() == len(steps.dvc_ids(project))
    assert ids(project) == {sha256(picture(n)).hexdigest() for n in range(10)} - {wanted}
    purge = AuditLog.from_environment().read(PLATFORM)[-1]
    assert (purge.action, purge.details["left"], purge.details["runs"]) == ("purge", [], [work.run_id])
    # A copy that Pedigree has not made is told, and left to its owner.
    (project / "mine.bin").write_bytes(image)
    found = takedown("--image", "mine.bin", *arguments[2:], code=1)
    assert found["purged"]["left"] == ["mine.bin: not a copy that Pedigree made, so it was not removed"]
