"""The trace over a repository made by real git and DVC commands, with its data on the real S3."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
import yaml
from jsonschema import Draft202012Validator
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.mlflow_client import TrackingError
from components.core.storage import sha256_file
from components.data.expectations import VALIDATION, Check, write_checks
from components.data.manifest import POOL_SCHEMA, write_manifest
from components.data.provenance import Provenance
from components.data.summary import SUMMARY
from components.lineage import trace_tree
from components.lineage.audit_log import AuditLog, Event
from components.lineage.lock_file import Record, RecordError, folder_id, upstream
from components.lineage.provenance import Tag, collect_origin
from components.lineage.trace import ACCEPTED, Node, Trace, outputs_of, trace
from components.lineage.trace_page import render_trace
from components.lineage.trace_targets import trace_target

pytestmark = pytest.mark.stack

PIPELINE = """
stages:
  curate:
    cmd: mkdir -p data/curated && cp prepared/manifest.parquet data/curated/
    deps: [components/curation, data/pool]
    params: [curate]
    outs: [data/curated]
  adapt:
    cmd: mkdir -p models/adapted && cp prepared/model.safetensors models/adapted/
    deps: [components/training, data/curated]
    params: [adapt]
    outs: [models/adapted]
  unrelated:
    cmd: mkdir -p models/unrelated && cp prepared/model.safetensors models/unrelated/
    outs: [models/unrelated]
"""


@dataclass
class Case:
    root: Path
    name: str
    prefix: str
    registered_at: str
    recorded_at: str


def sh(root: Path, *command: str) -> str:
    identity = {"GIT_AUTHOR_NAME": "tess", "GIT_AUTHOR_EMAIL": "t@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "tess", "GIT_COMMITTER_EMAIL": "t@example.org"}
    done = subprocess.run(command, cwd=root, env=os.environ | identity, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dvc(root: Path, *arguments: str) -> str:
    return sh(root, sys.executable, "-m", "dvc", *arguments)


def manifest(path: Path, licenses: dict[str, str]) -> None:
    rows = []
    for number, source in enumerate(["photos", "photos", "museum"]):
        row = {"image_id": f"{number:064d}", "shard": "00000.tar", "offset": 0, "length": 1, "format": "PNG"}
        row |= {"width": 1, "height": 1, "source": source, "source_uri": f"file://{number}"}
        rows.append(row | {"license": licenses[source], "label": None, "split": None})
    write_manifest(pa.Table.from_pylist(rows, schema=POOL_SCHEMA), path)


def files(root: Path) -> None:
    snapshot = root / "data/pool/photos/ab12"
    manifest(snapshot / "manifest.parquet", {"photos": "CC0-1.0", "museum": "CC-BY-4.0"})
    (snapshot / "00000.tar").write_bytes(b"not really a tar")
    (snapshot / SUMMARY).write_text("<!doctype html>")
    write_checks(snapshot / VALIDATION, [("snapshot", Check("ids_unique", "no image_id is there twice", 3, 0))])
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    Provenance(source="/in/photos", source_version="v1", ingested_at=when, ingested_by="ina").write(snapshot)
    manifest(root / "prepared/manifest.parquet", {"photos": "CC0-1.0", "museum": "CC-BY-4.0"})
    (root / "prepared/model.safetensors").write_bytes(b"weights")
    for code in ("curation", "training"):
        (root / "components" / code).mkdir(parents=True)
        (root / "components" / code / "stage.py").write_text(f"# {code}\n")
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text(f"name: {root.name}\ncurate: {{threshold: 0.45}}\nadapt: {{steps: 10}}\n")


@pytest.fixture(scope="module")
def case(stack, tmp_path_factory) -> Case:
    """A run as the flow makes it: code is committed, stages run, the version is registered, then the record."""
    root = tmp_path_factory.mktemp("traced")
    prefix = f"trace-{uuid.uuid4().hex[:10]}"
    sh(root, "git", "init", "-q", "-b", "runs/one")
    dvc(root, "init", "-q")
    url, endpoint = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{prefix}", os.environ["AWS_ENDPOINT_URL"]
    (root / ".dvc/config").write_text(f"[core]\n    remote = s\n['remote \"s\"']\n    url = {url}\n")
    (root / ".dvc/config.local").write_text(f"['remote \"s\"']\n    endpointurl = {endpoint}\n")
    files(root)
    dvc(root, "add", "-q", "data/pool/photos/ab12")
    sh(root, "git", "add", ".")
    sh(root, "git", "commit", "-q", "-m", "Code and pool")
    dvc(root, "repro", "-q")
    dvc(root, "push", "-q")
    registered_at = sh(root, "git", "rev-parse", "HEAD")
    name = register(root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    lock["stages"]["register"] = {"cmd": "python -m components register"}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    sh(root, "git", "add", "dvc.lock")
    sh(root, "git", "commit", "-q", "-m", "Run one")
    return Case(root, name, prefix, registered_at, sh(root, "git", "rev-parse", "HEAD"))


def register(root: Path) -> str:
    """A candidate and its promotion, as far as the trace can see them."""
    client, name = MlflowClient(), f"traced-{uuid.uuid4().hex[:10]}"
    labels = {"mlflow.user": "tess", "pedigree.run": "one"}
    run = client.create_run(client.create_experiment(name), run_name="one/register", tags=labels)
    tags = collect_origin(root, "models/adapted").tags()
    tags |= {Tag.PARENT: "models/pretrained", Tag.PARENT_SHA256: "0" * 64, Tag.DIGEST: "d1", Tag.VALIDATION: "passed"}
    client.create_registered_model(f"{name}-candidates")
    client.create_model_version(f"{name}-candidates", "s3://elsewhere/m-1", run.info.run_id, tags=tags)
    client.create_registered_model(name)
    tags |= {Tag.CANDIDATE: f"{name}-candidates/1"}
    client.create_model_version(name, f"s3://elsewhere/released/{name}", run.info.run_id, tags=tags)
    details = {"digest": "d1", "reason": "good", "candidate": f"{name}-candidates/1"}
    entry = AuditLog.from_environment().append(Event(name, "promote", f"{name}/1", "rita", details))
    client.set_model_version_tag(name, "1", Tag.AUDIT, f"{entry.sequence}:{entry.hash}")
    client.set_model_version_tag(f"{name}-candidates", "1", Tag.RELEASED, f"{name}/1")
    client.set_registered_model_alias(name, "champion", "1")
    client.set_terminated(run.info.run_id)
    return name


def kinds(found: Trace, kind: str) -> list[Node]:
    return [node for node in found.root.walk() if node.kind == kind]


def test_folder_id_is_dvcs_own(case: Case):
    stated = yaml.safe_load((case.root / "data/pool/photos/ab12.dvc").read_text())["outs"][0]["md5"]
    assert folder_id(case.root / "data/pool/photos/ab12") == stated
    assert Record(case.root).output("models/adapted") == folder_id(case.root / "models/adapted")


def test_tree_from_version_to_sources(case: Case):
    found = trace(f"{case.name}@champion", case.root)
    assert found.missing == []
    assert found.root.name == f"{case.name}/1"
    assert [n.name for n in kinds(found, "version")] == [f"{case.name}/1", f"{case.name}-candidates/1"]
    (event,) = kinds(found, "event")
    assert (event.facts["actor"], event.facts["reason"]) == ("rita", "good")
    assert kinds(found, "run")[0].facts["name"] == "one/register"
    (commit,) = kinds(found, "commit")
    assert (commit.name, commit.facts["record"]) == (case.registered_at, case.recorded_at)
    assert (commit.facts["branch"], commit.facts["subject"]) == ("runs/one", "Code and pool")
    adapt, curate = kinds(found, "stage")
    assert (adapt.name, curate.name) == ("adapt", "curate")
    assert adapt.facts["command"].startswith("mkdir -p models/adapted")
    assert adapt.facts["params"] == {"adapt": {"steps": 10}}
    assert adapt.facts["outs"] == {"models/adapted": folder_id(case.root / "models/adapted")}
    assert list(kinds(found, "code")[0].facts["paths"]) == ["components/curation", "components/training"]


def test_an_accepted_change_of_code_is_shown_below_its_stage(case: Case):
    """As `pedigree run --accept` writes it: for this code and these outputs, and once for others."""
    name = yaml.safe_load((case.root / "params.yaml").read_text())["name"]
    entry = Record(case.root, case.recorded_at).stages()["adapt"]
    code = next(dep["md5"] for dep in entry["deps"] if dep["path"] == "components/training")
    details = {"stage": "adapt", "code": code, "outputs": outputs_of(entry), "reason": "a log line"}
    for told in (details, details | {"code": "0" * 32}, details | {"outputs": {"models/adapted": "0" * 32}}):
        AuditLog.from_environment().append(Event(name, ACCEPTED, "before/adapt", "rita", told))
    adapt, curate = kinds(trace(f"{case.name}-candidates@latest", case.root), "stage")
    assert [(event.kind, event.facts["actor"], event.facts["reason"]) for event in adapt.children] == [
        ("event", "rita", "a log line")
    ]
    assert curate.children == []


def test_data_down_to_s3_objects_and_licenses(case: Case):
    found = trace(f"{case.name}-candidates@latest", case.root)
    assert found.missing == []
    (pool,) = kinds(found, "pool")
    snapshot = case.root / "data/pool/photos/ab12"
    assert pool.facts["manifest_sha256"] == sha256_file(snapshot / "manifest.parquet")
    bucket = os.environ["PEDIGREE_DATA_BUCKET"]
    assert set(pool.facts["objects"]) == {"00000.tar", "manifest.parquet", SUMMARY, VALIDATION}
    assert pool.facts["checks"] == {"snapshot: ids_unique": "no image_id is there twice; 0 of 3 failed"}
    address = pool.facts["objects"]["00000.tar"]
    assert address.startswith(f"s3://{bucket}/{case.prefix}/files/md5/")
    body = boto3.client("s3").get_object(Bucket=bucket, Key=address.removeprefix(f"s3://{bucket}/"))["Body"].read()
    assert body == (snapshot / "00000.tar").read_bytes()
    assert (pool.facts["source"], pool.facts["source_version"]) == ("/in/photos", "v1")
    assert (pool.facts["ingested_at"], pool.facts["ingested_by"]) == ("2026-01-02T00:00:00Z", "ina")
    sources = {node.name: node.facts for node in pool.children}
    assert sources["photos"] == {"license": "CC0-1.0", "images": 2}
    assert sources["museum"] == {"license": "CC-BY-4.0", "images": 1}
    assert [n.facts["images"] for n in kinds(found, "curated")[0].children] == [1, 2]


def test_works_with_nothing_but_git_and_the_services(case: Case, tmp_path: Path):
    """A fresh clone without data and with the run's branch only as a remote's, as an auditor has it."""
    sh(case.root, "git", "branch", "-f", "main", case.registered_at)
    sh(tmp_path, "git", "clone", "-q", "-b", "main", str(case.root), "clone")
    assert not (tmp_path / "clone/dvc.lock").exists()
    assert not (tmp_path / "clone/data/pool/photos/ab12").exists()
    found = trace(f"{case.name}@champion", tmp_path / "clone")
    assert found.missing == []
    assert len(kinds(found, "source")) == 4


def test_command_prints_the_tree_and_json(case: Case, monkeypatch: pytest.MonkeyPatch):
    import typer

    from flows.commands.decorators import command
    from flows.commands.trace import trace as trace_command

    app = typer.Typer()
    app.command()(command(checkout=False)(trace_command.__wrapped__))
    monkeypatch.chdir(case.root)
    shown = CliRunner().invoke(app, [f"{case.name}@champion", "--full"])
    assert shown.exit_code == 0, shown.output
    for text in (f"version {case.name}/1", "actor: rita", "stage adapt", "license: CC-BY-4.0", "images: 2"):
        assert text in shown.output
    assert f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{case.prefix}/files/md5/" in shown.output
    assert sha256_file(case.root / "models/adapted/model.safetensors") in shown.output  # hashes are never cut
    data = json.loads(CliRunner().invoke(app, [f"{case.name}@champion", "--json"]).stdout)
    assert data["complete"] is True
    assert data["trace"]["kind"] == "version"
    schema = json.loads((Path(trace_tree.__file__).with_name("trace.schema.json")).read_text())
    Draft202012Validator(schema).validate(data)
    assert schema["$defs"]["node"]["properties"]["kind"]["enum"] == list(trace_tree.KINDS)
    assert schema["properties"]["schema"]["const"] == trace_tree.SCHEMA
    with monkeypatch.context() as narrow:
        narrow.setenv("COLUMNS", "80")
        brief = CliRunner().invoke(app, [f"{case.name}@champion"]).stdout.splitlines()
    assert len(brief) < 24
    for text in ("rita: good", "stages curate", "museum CC-BY-4.0, 1 images; photos CC0-1.0, 2 images"):
        assert any(text in line for line in brief)
    refused = CliRunner().invoke(app, ["no-such@champion"])
    assert refused.exit_code == 1
    assert "no-such" in refused.stderr


def test_the_page_has_the_whole_tree_and_needs_no_network(case: Case, tmp_path: Path):
    found = trace(f"{case.name}@champion", case.root)
    found.root.missing.append("<script>alert(1)</script>")
    page = render_trace(found).decode()
    assert page == render_trace(found).decode()
    assert page.count('<details class="node"') == sum(1 for _ in found.root.walk())
    assert sha256_file(case.root / "models/adapted/model.safetensors") in page
    assert "<script>alert" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_a_commit_a_run_and_data_are_traced_too(case: Case):
    by_commit = trace_target(case.recorded_at[:10], case.root)
    assert by_commit.missing == []
    assert [node.name for node in kinds(by_commit, "stage")] == ["adapt", "curate", "register", "unrelated"]
    (pool,) = kinds(by_commit, "pool")
    assert pool.facts["object_versions"].keys() == {"00000.tar", "manifest.parquet", SUMMARY, VALIDATION}
    assert all(pool.facts["object_versions"].values())
    by_data = trace_target(pool.facts["dvc"].removesuffix(".dir"), case.root)
    assert [line for line in by_data.missing if case.name in line or case.prefix in line] == []
    assert (by_data.root.kind, by_data.root.facts["ingested_by"]) == ("pool", "ina")
    models = {node.name: node.facts["relation"] for node in kinds(by_data, "version")}
    assert models[f"{case.name}/1"] == models[f"{case.name}-candidates/1"] == ["in its pool"]
    by_image = trace_target(f"{0:064d}", case.root)
    assert {node.kind for node in by_image.root.children} == {"curated", "pool", "version"}
    run_id = "20260101-000000-abcd"
    sh(case.root, "git", "branch", f"runs/{run_id}", case.recorded_at)
    assert [node.kind for node in trace_target(run_id, case.root).root.children] == ["commit"]
    sh(case.root, "git", "branch", "-D", f"runs/{run_id}")
    for target, message in [("nothing", "'nothing': nothing to trace; give NAME@ALIAS"), ("0" * 32, "no commit here")]:
        with pytest.raises(ConfigError, match=message):
            trace_target(target, case.root)


def test_a_teacher_and_an_embedder_have_their_own_trace_once(case: Case):
    client, name = MlflowClient(), f"taught-{uuid.uuid4().hex[:10]}"
    client.create_registered_model(f"{name}-candidates")
    teacher = client.get_model_version(f"{case.name}-candidates", "1")
    tags = teacher.tags | {Tag.PARENT: f"{case.name}-candidates/1"}
    tags |= {Tag.PARENT_SHA256: teacher.tags[Tag.WEIGHTS_SHA256]}
    told = Event(name, "reject", f"{name}-candidates/1", "rita", {"reason": "blurred"})
    tags[Tag.REJECTED] = f"rita, event {AuditLog.from_environment().append(told).sequence}: blurred"
    del tags[Tag.RELEASED]
    client.create_model_version(f"{name}-candidates", "s3://elsewhere/m-2", teacher.run_id, tags=tags)
    found = trace(f"{name}-candidates/1", case.root)
    assert found.missing == []
    (parent,) = [node for node in found.root.children if node.kind == "parent"]
    assert parent.children[0].name == f"{case.name}-candidates/1"
    assert [node.facts["reason"] for node in found.root.children if node.kind == "event"] == ["blurred"]
    assert len(kinds(found, "source")) == 4  # the teacher's data is that of the student, and stands once
    again = [node for node in kinds(found, "pool") if node.facts.get("above")]
    assert len(again) == 1


def test_an_object_that_is_gone_is_said(case: Case):
    found = trace(f"{case.name}/1", case.root)
    bucket = os.environ["PEDIGREE_DATA_BUCKET"]
    address = kinds(found, "pool")[0].facts["objects"]["00000.tar"]
    place = {"Bucket": bucket, "Key": address.removeprefix(f"s3://{bucket}/")}
    body = boto3.client("s3").get_object(**place)["Body"].read()
    boto3.client("s3").delete_object(**place)
    try:
        assert trace(f"{case.name}/1", case.root).missing == [
            f"pool data/pool/photos/ab12: {address} (00000.tar): no such object"
        ]
    finally:
        boto3.client("s3").put_object(**place, Body=body)


def test_a_record_that_was_never_committed_is_said(case: Case, tmp_path: Path):
    sh(case.root, "git", "branch", "-f", "main", case.registered_at)
    sh(tmp_path, "git", "clone", "-q", "--single-branch", "-b", "main", str(case.root), "clone")
    (line,) = trace(f"{case.name}/1", tmp_path / "clone").missing
    assert line.startswith(f"commit {case.registered_at}: neither it nor a commit after it has the dvc.lock")


def test_what_is_not_found_is_said(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sh(tmp_path, "git", "init", "-q")
    (line,) = trace(f"{case.name}/1", tmp_path).missing
    assert line.startswith(f"commit {case.registered_at}: not in the git repository")
    with monkeypatch.context() as patch:
        patch.delenv("PEDIGREE_AUDIT_BUCKET")
        missing = trace(f"{case.name}/1", case.root).missing
        assert [line.partition(" ")[0] for line in missing] == ["version", "commit"]  # who let it in, and the code
        assert all("PEDIGREE_AUDIT_BUCKET is not set" in line for line in missing)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(TrackingError, match=r"does not answer .*'pedigree up' starts it"):
            trace(f"{case.name}/1", case.root)
    with pytest.raises(ConfigError, match="'nothing': not a model; write NAME@ALIAS"):
        trace("nothing", case.root)
    for reference, message in [
        (f"{case.name}/7", f"not found; the registry has {case.name} with the versions 1 and the aliases champion$"),
        (f"{case.name}@x", f"not found; the registry has {case.name} with the versions 1 and the aliases champion$"),
        ("no-such@x", f"^no-such@x: Registered Model .* not found; the registry has .*{case.name}"),
    ]:
        with pytest.raises(RecordError, match=message):
            trace(reference, case.root)


def test_contradictions_are_said(stack, case: Case):
    """A second promotion, done by hand in MLflow behind the audit log's back."""
    client, name = MlflowClient(), register(case.root)
    version = client.get_model_version(name, "1")
    tags = version.tags | {Tag.DIGEST: "another"}
    client.create_model_version(name, str(version.source), version.run_id, tags=tags)
    client.set_registered_model_alias(name, "champion", "2")
    client.delete_model_version(f"{name}-candidates", "1")
    client.delete_run(version.run_id)
    found = trace(f"{name}@champion", case.root)
    missing = found.missing
    assert f"version {name}/2: no event lets it in" in missing
    assert f"version {name}/2: the alias champion is on {name}/2, by the audit log it is on {name}/1" in missing
    candidate = kinds(found, "version")[1]
    assert "not found" in candidate.facts["deleted"]  # no fault: the released bytes and their event are enough


def test_upstream_follows_nested_paths():
    stages = {
        "a": {"outs": [{"path": "data/x"}]},
        "b": {"deps": [{"path": "data/x/part"}], "outs": [{"path": "models/b"}]},
        "c": {"deps": [{"path": "data/xy"}], "outs": [{"path": "models/c"}]},
    }
    assert upstream(stages, "models/b") == ["b", "a"]
    assert upstream(stages, "models/c") == ["c"]


@pytest.mark.parametrize("stage", ["distill", "distill@small"])
def test_a_student_is_found_in_a_lock_of_one_stage_and_in_an_old_one_of_its_own(tmp_path: Path, stage: str):
    adapted, small = {"path": "models/adapted", "md5": "1.dir"}, {"path": "models/students/small", "md5": "2.dir"}
    made = small if "@" in stage else {"path": "models/students", "md5": "3.dir"}
    stages = {
        "adapt": {"outs": [adapted]},
        stage: {"deps": [adapted], "outs": [made]},
        "evaluate@small": {"deps": [small], "outs": [{"path": "reports/evaluate/small/report.html", "md5": "4"}]},
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    record = Record(tmp_path)
    assert (record.output("models/students/small"), record.output("models/adapted")) == ("2.dir", "1.dir")
    assert record.holder("models/students/small") == (("2.dir", "") if "@" in stage else ("3.dir", "small/"))
    assert record.output("models/students/big") is None  # no stage read it
    assert record.output("models") is None
    assert upstream(stages, "models/students/small") == [stage, "adapt"]


def test_no_lock_file(tmp_path: Path):
    with pytest.raises(RecordError, match=r"dvc\.lock: no such file"):
        Record(tmp_path).stages()
