"""The tamper drill: each single change of what is stored of a promoted model is named, and nothing else is."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from mlflow.entities import Metric

from components.core.git import git
from components.core.storage import StorageError
from components.lineage import verify_objects
from components.lineage.anchors import read_anchors
from components.lineage.audit_chain import PURGE, canonical, hash_of
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from components.lineage.provenance import Tag
from components.lineage.trace import trace
from components.lineage.verify import Extent, verify
from components.lineage.verify_data import read_shard
from components.lineage.verify_objects import Job, choose
from tests.lineage.tampered import EVALUATION, POOL, RUN, Project, make_project

pytestmark = pytest.mark.stack
WEIGHTS = "artifacts/weights/model.safetensors"
BRANCH = f"refs/heads/runs/{RUN}"


@pytest.fixture(scope="module")
def project(servers, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("tampered"))


def faults(project: Project, version: str = "@champion") -> list[str]:
    return verify(f"{project.name}{version}", project.root).faults


def test_nothing_is_reported_on_the_untouched_state(project: Project):
    found = verify(f"{project.name}@champion", project.root)
    assert found.faults == []
    assert found.versions == [f"{project.name}/1", f"{project.name}-candidates/1"]
    assert found.shards == (3, 3)
    assert found.shard_bytes[0] == found.shard_bytes[1] > 0
    assert faults(project, "-small-candidates/1") == []
    assert trace(f"{project.name}@champion", project.root).missing == []


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextmanager
def replaced(project: Project, address: str, data: bytes | None) -> Iterator[str]:
    """Another object at an address, or none."""
    before = project.get(address)
    project.put(address, data) if data is not None else project.delete(address)
    try:
        yield f"{address}: "
    finally:
        project.put(address, before)


def single(cases: Sequence[Any]) -> list[Any]:
    """Of single changes, `make test` tries the first only: it tries all of them together."""
    first, *others = cases
    more = [pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow) for case in others]
    return [first, *more]


DATA = [
    (POOL, "00000.tar"), (POOL, "manifest.parquet"), (POOL, "summary.html"), (POOL, "rejected.parquet"),
    (EVALUATION, "00000.tar"),
    ("data/curated", "00000.tar"), ("data/curated", "manifest.parquet"), ("data/curated", "rejected.parquet"),
    ("data/embeddings", "pool.npy"), ("models/adapted", "model.safetensors"),
    ("models/students", "small/config.json"), ("reports/evaluate/teacher/report.html", None),
]  # fmt: skip


def test_flipped_bytes_everywhere_in_the_dvc_remote_are_each_named(project: Project):
    with ExitStack() as changes:
        addresses = {project.dvc_object(path, inner) for path, inner in DATA}  # equal files are one object
        told = [
            changes.enter_context(replaced(project, address, flipped(project.get(address)))) for address in addresses
        ]
        found = faults(project)
    assert len(told) > 8
    assert [named for named in told if not any(line.startswith(f"{named}not the bytes of") for line in found)] == []


@pytest.mark.parametrize(("path", "inner"), single(DATA))
def test_a_flipped_byte_in_the_dvc_remote_is_named(project: Project, path: str, inner: str | None):
    address = project.dvc_object(path, inner)
    shown = f"{path}/{inner}" if inner else path
    with replaced(project, address, flipped(project.get(address))) as named:
        assert f"{named}not the bytes of {shown} that were recorded" in faults(project)


@pytest.mark.parametrize("path", ["models/adapted", "models/pretrained"])
def test_deleted_weights_of_the_model_and_of_its_parent_are_named(project: Project, path: str):
    address = project.dvc_object(path, "model.safetensors")
    with replaced(project, address, None) as named:
        assert f"{named}no such object" in faults(project)


def test_a_listing_that_lacks_a_shard_is_named(project: Project):
    address = project.dvc_object(POOL)
    left = [item for item in json.loads(project.get(address)) if item["relpath"] != "00000.tar"]
    with replaced(project, address, json.dumps(left).encode()) as named:
        found = faults(project)
    assert f"{named}the listing of {POOL} is not the one that dvc.lock or .dvc records" in found
    assert f"{POOL}/manifest.parquet: names the shard 00000.tar, which the folder lacks" in found


def source(version, project: Project) -> str:
    if str(version.source).startswith("s3://"):
        return version.source
    place = project.mlflow.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    return f"s3://{os.environ['PEDIGREE_MODELS_BUCKET']}/mlflow/{place.partition(':/')[2].strip('/')}"


FILES: dict[str, tuple[str, str, Callable[[bytes], bytes | None]]] = {
    "released weights changed": ("released", WEIGHTS, flipped),
    "released weights deleted": ("released", WEIGHTS, lambda _: None),
    "released code changed": ("released", "pyfunc_model.py", lambda data: data + b"\nimport os\n"),
    "signature removed": ("released", "model.sig", lambda _: None),
    "signature of another": ("released", "model.sig", lambda data: data.replace(b"payload", b"payloaf")),
    "candidate's weights changed": ("candidate", WEIGHTS, flipped),
    "candidate's card changed": ("candidate", "artifacts/card.md", lambda data: data + b"!"),
}


def test_changed_files_of_both_models_are_each_named(project: Project):
    with ExitStack() as changes:
        told = {}
        for change in ("released code changed", "released weights changed", "candidate's weights changed",
                       "candidate's card changed"):  # fmt: skip
            which, path, edit = FILES[change]
            version = project.champion if which == "released" else project.candidate()
            address = f"{source(version, project)}/{path}"
            told[change] = changes.enter_context(replaced(project, address, edit(project.get(address))))
        found = faults(project)
    assert [change for change, named in told.items() if not any(line.startswith(named) for line in found)] == []


@pytest.mark.parametrize("change", single([*FILES]))
def test_a_changed_file_of_the_model_is_named(project: Project, change: str):
    which, path, edit = FILES[change]
    version = project.champion if which == "released" else project.candidate()
    address = f"{source(version, project)}/{path}"
    with replaced(project, address, edit(project.get(address))) as named:
        assert any(line.startswith(named) for line in faults(project))


def test_a_foreign_file_beside_a_released_model_is_named(project: Project):
    address = f"{source(project.champion, project)}/code/components/foreign.py"
    project.put(address, b"")
    try:
        assert f"{address}: not of the model" in faults(project)
    finally:
        project.delete(address)


REGISTERED = [tag for tag in Tag if tag not in (Tag.RELEASED, Tag.REJECTED, Tag.CANDIDATE, Tag.AUDIT)]


@pytest.mark.parametrize(
    ("which", "tags"),
    [("candidate", [*REGISTERED, Tag.RELEASED, Tag.REJECTED]), ("released", [*REGISTERED, Tag.CANDIDATE, Tag.AUDIT])],
)
@pytest.mark.parametrize("delete", [False, True])
def test_every_edited_or_deleted_tag_is_named(project: Project, which: str, tags: list[Tag], delete: bool):
    version = project.champion if which == "released" else project.candidate()
    place = (version.name, version.version)
    known = [tag for tag in tags if tag in version.tags or not delete]
    for tag in known:
        project.mlflow.delete_model_version_tag(*place, tag) if delete else project.mlflow.set_model_version_tag(
            *place, tag, "[]" if tag in (Tag.POOL, Tag.CURATED, Tag.EVALUATION) else "other"
        )
    try:
        found, traced = faults(project), trace(f"{version.name}/{version.version}", project.root).missing
    finally:
        for tag in known:
            if tag in version.tags:
                project.mlflow.set_model_version_tag(*place, tag, version.tags[tag])
            else:
                project.mlflow.delete_model_version_tag(*place, tag)
    address = f"{version.name}/{version.version}"
    for lines in (found, traced):
        assert [tag for tag in known if not any(f"tag {tag} of {address} " in line for line in lines)] == []


def test_an_edited_card_is_named(project: Project):
    version = project.champion
    project.mlflow.update_model_version(version.name, version.version, "Better than all.")
    try:
        assert any(
            line.startswith(f"description of {project.name}/1 in MLflow is not its card") for line in faults(project)
        )
    finally:
        project.mlflow.update_model_version(version.name, version.version, version.description)


def test_a_moved_alias_is_named(project: Project):
    project.mlflow.delete_registered_model_alias(project.name, "champion")
    try:
        told = f"{project.name}: the alias champion is on no version, by the audit log it is on {project.name}/1"
        assert told in faults(project, "/1")
    finally:
        project.mlflow.set_registered_model_alias(project.name, "champion", "1")


def test_a_copy_that_no_event_lets_in_and_the_alias_on_it_are_named(project: Project):
    """As MLflow's button "Promote model" makes one."""
    made = project.mlflow.copy_model_version(f"models:/{project.name}-candidates/1", project.name)
    project.mlflow.set_registered_model_alias(project.name, "champion", made.version)
    try:
        found = faults(project, "/1")
        copy = faults(project, f"/{made.version}")
    finally:
        project.mlflow.set_registered_model_alias(project.name, "champion", "1")
        project.mlflow.delete_model_version(project.name, made.version)
    assert any(line.endswith("is not signed") or "model.sig" in line for line in copy), copy
    told = f"{project.name}: the alias champion is on {project.name}/{made.version}, by the audit log it is on "
    assert any(line.startswith(told) for line in found), found
    assert any(f"{project.name}/{made.version}" in line and "no event" in line for line in found), found


def run_of(project: Project, stage: str):
    experiment = project.mlflow.get_experiment_by_name(project.name)
    found = f"tags.`pedigree.stage` = '{stage}' AND tags.`pedigree.item` = 'teacher'"
    return project.mlflow.search_runs([experiment.experiment_id], found)[0]


@pytest.mark.parametrize(
    ("stage", "path"),
    [("evaluate", "result.json"), ("evaluate", "report.html"), ("register", "passport.html"),
     ("register", "evaluation/report.html")],
)  # fmt: skip
def test_an_edited_artifact_of_a_run_is_named(project: Project, stage: str, path: str):
    place = run_of(project, stage).info.artifact_uri.partition(":/")[2].strip("/")
    address = f"s3://{os.environ['PEDIGREE_MODELS_BUCKET']}/mlflow/{place}/{path}"
    with replaced(project, address, b"<p>Better than all.</p>") as named:
        assert any(line.startswith(f"{named}not the report in the commit of {RUN}/") for line in faults(project))


@contextmanager
def rewritten(project: Project, path: str, old: str, new: str) -> Iterator[None]:
    """The run's last commit, amended."""
    tip = git(project.root, "rev-parse", "HEAD")
    file = project.root / path
    file.write_text(file.read_text().replace(old, new))
    git(project.root, "commit", "-q", "--all", "--amend", "--no-edit")
    try:
        yield
    finally:
        git(project.root, "reset", "-q", "--hard", tip)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [("dvc.lock", "seed: 7", "seed: 8"), ("reports/evaluate/teacher/result.json", "0.75", "0.99")],
)
def test_an_amended_commit_is_named(project: Project, path: str, old: str, new: str):
    tip = git(project.root, "rev-parse", "HEAD")
    with rewritten(project, path, old, new):
        found = faults(project)
        traced = trace(f"{project.name}@champion", project.root).missing
    told = f"branch runs/{RUN} was rewritten: {tip} (anchored as anchors/{RUN}/{tip[:12]}) is not in it"
    assert told in found
    assert any(line.endswith(told) for line in traced)


def test_a_commit_after_the_end_of_the_run_is_named(project: Project):
    tip = git(project.root, "rev-parse", "HEAD")
    git(project.root, "commit", "-q", "--allow-empty", "-m", "evaluate@teacher: ran for 1 s")
    try:
        assert f"branch runs/{RUN} has commits after the end of its run, {tip}" in faults(project)
    finally:
        git(project.root, "reset", "-q", "--hard", tip)


def test_a_deleted_branch_and_a_deleted_anchor_are_named(project: Project):
    tip, anchors = git(project.root, "rev-parse", "HEAD"), read_anchors(project.root, RUN)
    git(project.root, "checkout", "-q", "--detach")
    git(project.root, "update-ref", "-d", BRANCH)
    try:
        (line,) = faults(project)
        assert line.startswith(f"branch runs/{RUN} is not in this repository, or was deleted; `git branch runs/{RUN} ")
        assert any(line in told for told in trace(f"{project.name}@champion", project.root).missing)
    finally:
        git(project.root, "update-ref", BRANCH, tip)
        git(project.root, "checkout", "-q", f"runs/{RUN}")
    registered = project.candidate().tags[Tag.ANCHOR]
    (anchor,) = (anchor for anchor in anchors if anchor.id == registered)
    told = [entry.details for entry in AuditLog.from_environment().read(f"{project.name}-candidates")]
    assert [details["anchor"] for details in told] == [registered]
    git(project.root, "tag", "-d", anchor.name)
    try:
        (line,) = faults(project)
        assert line.startswith(f"anchor of run {RUN} (tag object {registered}) is gone or was made again")
    finally:
        git(project.root, "update-ref", f"refs/tags/{anchor.name}", registered)


@contextmanager
def in_the_log(project: Project, change: str) -> Iterator[None]:
    """A change of the one event of the model, by somebody with all rights."""
    bucket, log = os.environ["PEDIGREE_AUDIT_BUCKET"], AuditLog.from_environment()
    (entry,) = log.read(project.name)
    first, second = (f"events/{project.name}/{number:08d}.json" for number in (1, 2))
    body, put = project.get(f"s3://{bucket}/{first}"), project.s3.put_object

    def wipe(key: str) -> None:
        for kind in ("Versions", "DeleteMarkers"):
            for item in project.s3.list_object_versions(Bucket=bucket, Prefix=key).get(kind, []):
                project.s3.delete_object(
                    Bucket=bucket, Key=key, VersionId=item["VersionId"], BypassGovernanceRetention=True
                )

    if change == "deleted":
        wipe(first)
    elif change == "changed":
        put(Bucket=bucket, Key=first, Body=body.replace(b"Rita", b"Anna"))
    else:
        forged = {"sequence": 2, "previous": entry.hash, "actor": "Nobody", "action": "reject"}
        made = dataclasses.replace(entry, **forged, subject=f"{project.name}-candidates/1", details={"reason": "bad"})
        put(
            Bucket=bucket, Key=second, Body=canonical(dataclasses.asdict(dataclasses.replace(made, hash=hash_of(made))))
        )
    try:
        yield
    finally:
        wipe(first)
        wipe(second)
        put(Bucket=bucket, Key=first, Body=body, IfNoneMatch="*")


@pytest.mark.parametrize(
    ("change", "told"),
    [("deleted", "missing: the end of the chain was cut"), ("changed", "overwritten: it has more than one version"),
     ("forged", "its signature is not that of the reviewer's key")],
)  # fmt: skip
def test_a_changed_log_is_named(project: Project, change: str, told: str):
    with in_the_log(project, change):
        found = faults(project)
    assert any(told in line for line in found), found


def test_an_interrupted_check_goes_on_and_a_service_that_is_away_is_no_fault(project: Project, monkeypatch):
    original, calls = verify_objects.Objects._stream, []

    def failing(self, address, read):
        calls.append(address)
        if len(calls) > 60:
            raise StorageError("S3 does not answer")
        return original(self, address, read)

    with monkeypatch.context() as patch:
        patch.setattr(verify_objects.Objects, "_stream", failing)
        with pytest.raises(StorageError, match="does not answer"):
            verify(f"{project.name}@champion", project.root)
    kept = project.root / ".pedigree/cache/verify/read.jsonl"
    kept.write_text(kept.read_text() + '["cut off by a ki')
    found = verify(f"{project.name}@champion", project.root)
    assert (found.faults, found.remembered > 10, kept.exists()) == ([], True, False)
    assert verify(f"{project.name}@champion", project.root, Extent(1.0, anew=True)).remembered == 0


def test_nothing_is_left_of_all_these_changes(project: Project):
    assert faults(project) == []


def test_what_a_purge_took_away_is_no_fault(project: Project):
    """After the tests of single changes, since the event stays."""
    address, kept = (project.dvc_object(POOL, name) for name in ("00000.tar", "summary.html"))
    id_ = "".join(address.split("/")[-2:])
    with replaced(project, address, None) as named:
        assert f"{named}no such object" in faults(project)
        AuditLog.from_environment().append(Event(PLATFORM, PURGE, "w-1", "Rita", {"objects": [id_], "runs": []}))
        found = verify(f"{project.name}@champion", project.root)
        assert found.faults == []
        assert f"1 objects were purged, as the audit log says: {named}no such object" in found.notes
        with replaced(project, kept, None) as other:
            assert faults(project) == [f"{other}no such object"]


@pytest.mark.parametrize("stage", ["evaluate", "register"])
def test_metrics_of_a_finished_run_are_named(project: Project, stage: str):
    """The last one, since a metric cannot be taken back."""
    run = run_of(project, stage)
    late = int(time.time() * 1000) + 10_000
    name = f"MLflow run {run.info.run_name} ({run.info.run_id})"
    project.mlflow.log_batch(run.info.run_id, [Metric("knn_top1", 0.99, late, 1), Metric("better", 1.0, late, 1)])
    try:
        found, traced = faults(project), trace(f"{project.name}@champion", project.root).missing
    finally:
        project.mlflow.log_batch(run.info.run_id, [Metric("knn_top1", 0.75, late + 1, 2)])
    assert f"{name}: metric knn_top1 is 0.99, in its commit 0.75" in found
    assert f"{name}: metric better (1.0) was logged after it had ended" in found
    assert any(line.endswith("metric knn_top1 is 0.99, in its commit 0.75") for line in traced) == (stage == "register")


def test_a_sample_takes_shards_until_it_has_its_share():
    shards = [Job(f"s3://b/{number}", list, shard=True, size=10) for number in range(100)]
    assert len(choose(shards, 0.1, 0, seed=1)) == 10
    assert choose(shards, 0.1, 0, seed=1) == choose(shards, 0.1, 0, seed=1) != choose(shards, 0.1, 0, seed=2)
    assert len(choose(shards, 0.1, always=500, seed=1)) == 50
    assert len(choose(shards, 0.0, always=10**9, seed=1)) == 100


def test_a_shard_is_compared_with_its_rows(tmp_path):
    from tests.registry.conftest import PHOTOGRAPHS, write_data

    write_data(tmp_path / "data", curated=False)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "data/manifest.parquet").to_pylist()
    rows = {row["offset"]: (row["image_id"], row["length"]) for row in table}
    data = (tmp_path / "data/00000.tar").read_bytes()
    assert read_shard(io.BytesIO(data), rows)["faults"] == []
    first = min(rows)
    other = {**rows, first: ("0" * 64, rows[first][1])}
    (line,) = read_shard(io.BytesIO(data), other)["faults"]
    assert line.startswith(f"image {'0' * 64} of the manifest has bytes of SHA-256 {rows[first][0]}")
    (line,) = read_shard(io.BytesIO(data), {k: v for k, v in rows.items() if k != first})["faults"]
    assert line.endswith("is in no row of the manifest")
    (line,) = read_shard(io.BytesIO(data), {**rows, 10**9: ("1" * 64, 1)})["faults"]
    assert line == f"no image at byte 1000000000, where the manifest has {'1' * 64}"
    assert len(rows) == len(PHOTOGRAPHS)
