"""`pedigree audit` on the real services."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.lineage.audit_anchors import TAG, anchor_experiment
from components.lineage.audit_chain import Head
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from flows.cli import app
from tests.flows.repository import make_repository

pytestmark = pytest.mark.stack


def audit(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["audit", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_log_verify_and_export(servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bucket, name = f"audit-{uuid.uuid4().hex[:10]}", f"audit-{uuid.uuid4().hex[:10]}"
    boto3.client("s3").create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    root, client = make_repository(tmp_path), MlflowClient()
    monkeypatch.setenv("PEDIGREE_AUDIT_BUCKET", bucket)
    monkeypatch.chdir(root)
    monkeypatch.setattr("flows.commands.decorators.supervisor.connect", lambda *_, **__: {})
    for experiment in client.search_experiments():  # anchors of other tests, in another bucket
        client.set_experiment_tag(experiment.experiment_id, TAG, "")
    for model in client.search_registered_models():
        client.set_registered_model_tag(model.name, TAG, "")

    assert audit("log")[1] == "no events\n"
    log = AuditLog.from_environment()
    log.append(Event(name, "promote", f"{name}/1", "Rita", {"reason": "good [at night]"}))
    last = log.append(Event(PLATFORM, "run-ended", "run", "Rita", {"how": "Run finished"}))
    client.create_experiment(name)
    anchor_experiment(client, name, PLATFORM, Head(last.sequence, last.hash))

    code, shown, _ = audit("log", name)
    assert code == 0
    assert "good [at night]" in shown
    assert "Run finished" not in shown
    found = json.loads(audit("log", "--action", "run-ended", "--json")[1])
    assert [(event["name"], event["subject"]) for event in found] == [(PLATFORM, "run")]
    assert json.loads(audit("log", "--since", "2999-01-01", "--json")[1]) == []
    assert audit("log", "--since", "soon")[0] == 2
    assert f"no such chain; the log has {PLATFORM}, {name}" in audit("log", "none")[2].replace("\n", " ")

    code, shown, told = audit("verify")
    assert (code, told) == (0, "")
    assert "1 anchors compared" in shown
    file = str(tmp_path / "audit.jsonl")
    assert json.loads(audit("export", "--out", file, "--json")[1]) == {"file": file, "events": 2}
    assert audit("verify", file)[0] == 0
    assert audit("export", "--out", str(tmp_path / "no/audit.jsonl"))[0] == 2

    s3, where = boto3.client("s3"), {"Bucket": bucket, "Key": f"events/{PLATFORM}/00000001.json"}
    s3.delete_object(**where, VersionId=s3.head_object(**where)["VersionId"], BypassGovernanceRetention=True)
    code, shown, told = audit("verify", "--json")
    assert code == 1
    assert not json.loads(shown)["holds"]
    assert f"{where['Key']}: missing: MLflow's experiment {name} anchors it" in told
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, shown, told = audit("verify", "--json")
    assert (code, json.loads(shown)["holds"]) == (75, None)
    assert "does not answer" in told
