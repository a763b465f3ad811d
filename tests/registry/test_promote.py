"""Promotion on the real services: bytes, aliases, audit, and what happens when it dies half way."""

from __future__ import annotations

import itertools
import json
import os

import boto3
import mlflow
import numpy as np
import pandas as pd
import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.lineage.audit_log import AuditLog
from components.lineage.provenance import Tag
from components.registry import promote as promotion
from components.registry.promote import promote
from components.registry.publish import RegistryError
from components.registry.release import Released
from flows.commands.decorators import command
from flows.commands.promote import promote as promote_command

pytestmark = pytest.mark.stack


@pytest.fixture
def name(finished, name: str) -> str:
    """A model of its own with the two finished candidates: the same bytes and tags under another name."""
    client, candidates = MlflowClient(), f"{finished['name']}-candidates"
    client.create_registered_model(f"{name}-candidates")
    for number in ("1", "2"):
        version = client.get_model_version(candidates, number)
        model_id = version.source.removeprefix("models:/")
        client.create_model_version(
            f"{name}-candidates", version.source, version.run_id, tags=version.tags, model_id=model_id
        )
    return name


def state(name: str) -> dict[str, object]:
    """Everything a promotion changes: aliases, versions, events."""
    client = MlflowClient()
    return {
        "aliases": {k: str(v) for k, v in client.get_registered_model(name).aliases.items()},
        "versions": len(client.search_model_versions(f"name='{name}'")),
        "events": [(e.sequence, e.subject) for e in AuditLog.from_environment().read(name)],
    }


def test_champion_loads_from_released_bytes(finished, name: str, photographs, monkeypatch):
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Rita")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "rita@example.org")
    candidate = finished["first"]["teacher"]
    done = promote(f"{name}/1", "better on every test")
    assert (done.changed, done.version, done.previous) == (True, "1", None)
    assert done.candidate == f"{name}-candidates/1"
    assert done.digest == candidate["digest"]
    assert done.source == f"s3://{os.environ['PEDIGREE_MODELS_BUCKET']}/released/{name}/{candidate['digest']}"
    frame = pd.DataFrame({"image": photographs})
    champion = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    trained = mlflow.pyfunc.load_model(candidate["uri"])
    np.testing.assert_array_equal(champion.predict(frame), trained.predict(frame))
    (entry,) = AuditLog.from_environment().read(name)
    assert (entry.action, entry.subject) == ("promote", f"{name}/1")
    assert entry.actor == "Rita <rita@example.org>"
    assert entry.details["actor_from"] == "git's user.name and user.email; MLflow's login admin is shared"
    assert entry.details["reason"] == "better on every test"
    assert entry.details["digest"] == candidate["digest"]
    version = MlflowClient().get_model_version(name, "1")
    assert version.tags[Tag.AUDIT] == f"1:{entry.hash}"
    assert version.tags[Tag.CANDIDATE] == f"{name}-candidates/1"
    assert version.tags[Tag.COMMIT]


def test_previous_keeps_the_champion_before(name: str):
    promote(f"{name}/1", "the first")
    done = promote(f"{name}/2", "the second")
    assert (done.version, done.previous) == ("2", "1")
    assert state(name)["aliases"] == {"champion": "2", "previous": "1"}
    back = promote(f"{name}/1", "the second was worse")
    assert (back.version, back.previous) == ("1", "2")
    events = [(1, f"{name}/1"), (2, f"{name}/2"), (3, f"{name}/1")]
    assert state(name) == {"aliases": {"champion": "1", "previous": "2"}, "versions": 2, "events": events}


def test_champion_already(name: str):
    promote(f"{name}/1", "first")
    before = state(name)
    again = promote(f"{name}/1", "again")
    assert (again.changed, again.event, again.version) == (False, None, "1")
    assert state(name) == before


class Killed(BaseException):
    """As SIGKILL: no handler of the code under test sees it."""


STEPS = [
    (Released, "_put", 5),
    (Released, "copy_in", 1),
    (promotion, "_released_version", 1),
    (promotion, "_record", 1),
    (MlflowClient, "set_model_version_tag", 1),
    (MlflowClient, "set_registered_model_alias", 1),
    (MlflowClient, "set_registered_model_alias", 2),
]


def test_killed_at_any_step_and_run_again(name: str):
    """A call dies before each step in turn, so after each step but the last; the last call is left alone."""
    promote(f"{name}/1", "the first")
    for owner, function, count in STEPS:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, function, count)
            with pytest.raises(Killed):
                promote(f"{name}@latest", "the second")
    promote(f"{name}@latest", "the second")
    events = [(1, f"{name}/1"), (2, f"{name}/2")]
    assert state(name) == {"aliases": {"champion": "2", "previous": "1"}, "versions": 2, "events": events}


def kill_at(patch: pytest.MonkeyPatch, owner: object, function: str, count: int) -> None:
    original, calls = getattr(owner, function), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, function, dying)


def test_alias_moves_only_after_the_event(name: str, monkeypatch):
    monkeypatch.setattr(AuditLog, "append", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        promote(f"{name}@latest", "reason")
    assert MlflowClient().get_registered_model(name).aliases == {}


def test_tampered_candidate_is_refused_and_the_file_named(finished, name: str):
    client, root = MlflowClient(), finished["root"]
    model_id = client.get_model_version(f"{name}-candidates", "1").source.removeprefix("models:/")
    client.log_model_artifacts(model_id, str(root / "models/pretrained"), "artifacts/weights")
    try:
        with pytest.raises(RegistryError, match=r"artifacts/weights/model\.safetensors") as error:
            promote(f"{name}/1", "reason")
    finally:
        client.log_model_artifacts(model_id, str(root / "models/adapted"), "artifacts/weights")
    assert len(str(error.value).splitlines()) == 1
    assert AuditLog.from_environment().read(name) == []
    assert not client.search_registered_models(f"name='{name}'")


def test_other_bytes_at_the_released_place_are_refused(finished, name: str):
    digest = finished["first"]["teacher"]["digest"]
    bucket, key = os.environ["PEDIGREE_MODELS_BUCKET"], f"released/{name}/{digest}/MLmodel"
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"other")
    with pytest.raises(RegistryError, match=r"MLmodel: holds other bytes than the candidate"):
        promote(f"{name}/1", "reason")


def test_bad_requests_have_one_clear_line(name: str, monkeypatch):
    for reference, reason, message in [
        (f"{name}@latest", " ", "needs a reason"),
        (name, "r", "write NAME@latest or NAME/NUMBER"),
        (f"{name}/9", "r", f"no such candidate; {name}-candidates has versions 1, 2"),
        (f"{name}@best", "r", "no such candidate"),
        ("no-such-model@latest", "r", "no-such-model-candidates has no versions"),
    ]:
        with pytest.raises((ConfigError, RegistryError), match=message):
            promote(reference, reason)
    monkeypatch.delenv("PEDIGREE_MODELS_BUCKET")
    with pytest.raises(RegistryError, match="PEDIGREE_MODELS_BUCKET is not set"):
        promote(f"{name}@latest", "r")


def test_command(name: str):
    app = typer.Typer()
    app.command()(command(checkout=False)(promote_command.__wrapped__))
    done = CliRunner().invoke(app, [f"{name}/1", "--reason", "good", "--json"])
    assert json.loads(done.stdout)["version"] == "1"
    again = CliRunner().invoke(app, [f"{name}/1", "--reason", "good"])
    assert again.exit_code == 0
    assert f"{name}-candidates/1 is the champion of {name} already (version 1)" in again.stdout
    refused = CliRunner().invoke(app, [f"{name}/9", "--reason", "good"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {name}/9: no such candidate")
    assert CliRunner().invoke(app, [f"{name}/1"]).exit_code == 2
