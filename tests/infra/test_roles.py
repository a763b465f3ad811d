"""The roles of the local stack, over HTTP: the trainer writes candidates, the reviewer released models."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import HTTPError

from components.core.errors import PedigreeError
from components.core.signing import PRIVATE_KEY, PUBLIC_KEY
from components.core.user import ADMIN, REVIEWER, TRAINER
from components.lineage.audit_log import AuditLog
from components.registry import stage
from components.registry.promote import promote, who
from components.registry.standing import with_alias
from infra.local import supervisor
from infra.local.services import request
from infra.local.site import AUDIT_BUCKET, AUDIT_POLICY, DATA_BUCKET, MODELS_BUCKET, Site
from tests.registry.conftest import CONFIG, TRACE, make_workspace

pytestmark = pytest.mark.stack


@pytest.fixture
def role(servers, monkeypatch) -> Callable[..., MlflowClient]:
    """Work as one of the stack's users."""

    def as_user(name: str, password: str | None = None) -> MlflowClient:
        login = supervisor.environment(servers.root, name) if password is None else {}
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password or login["MLFLOW_TRACKING_PASSWORD"])
        return MlflowClient(servers.env["MLFLOW_TRACKING_URI"])

    return as_user


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises((MlflowException, HTTPError), match="Permission denied"):
        call(*arguments)


def test_the_trainer_writes_candidates_and_nothing_that_is_released(role):
    name = f"roles-{uuid.uuid4().hex[:8]}"
    trainer = role(TRAINER)
    run = trainer.create_run(trainer.create_experiment(name))
    trainer.log_text(run.info.run_id, "x", "a.txt")
    trainer.create_registered_model(f"{name}-candidates")
    trainer.create_model_version(f"{name}-candidates", run.info.artifact_uri, run.info.run_id)

    reviewer = role(REVIEWER)
    reviewer.create_registered_model(name)
    reviewer.create_model_version(name, run.info.artifact_uri, run.info.run_id, tags={"a": "b"})
    reviewer.set_registered_model_alias(name, "champion", "1")
    refused(reviewer.log_text, run.info.run_id, "y", "a.txt")

    trainer = role(TRAINER)
    assert trainer.get_model_version_by_alias(name, "champion").version == "1"  # it reads what it learns from
    refused(trainer.create_model_version, name, run.info.artifact_uri, run.info.run_id)
    refused(trainer.set_registered_model_alias, name, "champion", "1")
    refused(trainer.delete_registered_model_alias, name, "champion")
    refused(trainer.set_model_version_tag, name, "1", "a", "c")
    refused(trainer.delete_model_version, name, "1")
    refused(trainer.rename_registered_model, name, f"{name}-mine")
    refused(trainer.delete_registered_model, name)


def test_up_gives_each_role_what_older_stacks_hold_and_takes_what_a_trainer_squats(servers, role):
    name = f"old-{uuid.uuid4().hex[:8]}"
    admin = role(ADMIN)
    experiment = admin.create_experiment(name)
    for model in (name, f"{name}-candidates"):
        admin.create_registered_model(model)
    trainer = role(TRAINER)
    run = trainer.create_run(experiment)
    trainer.create_registered_model(f"{name}-small")  # before a reviewer has released any of this name
    refused(trainer.create_model_version, f"{name}-candidates", run.info.artifact_uri, run.info.run_id)
    supervisor.up(servers.root, only=("s3", "mlflow", "prefect"))
    trainer.create_model_version(f"{name}-candidates", run.info.artifact_uri, run.info.run_id)
    for model in (name, f"{name}-small"):
        refused(trainer.create_model_version, model, run.info.artifact_uri, run.info.run_id)
        role(REVIEWER).create_model_version(model, run.info.artifact_uri, run.info.run_id)
        role(TRAINER)


def test_the_actor_is_whom_mlflow_knows_else_whom_git_knows(servers, role, monkeypatch, tmp_path):
    name = f"rita-{uuid.uuid4().hex[:8]}"
    admin = f"{ADMIN}:{servers.env['MLFLOW_TRACKING_PASSWORD']}"
    user = {"username": name, "password": "a long password"}
    request(servers.env["MLFLOW_TRACKING_URI"], "/api/2.0/mlflow/users/create", admin, "POST", user)
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Rita")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "rita@example.org")
    role(name, "a long password")
    assert who(None) == {"actor": name, "actor_from": "MLflow user, authenticated by the server"}
    role(REVIEWER)
    shared = "; MLflow's login reviewer is shared"
    of_git = {"actor": "Rita <rita@example.org>", "actor_from": f"git's user.name and user.email{shared}"}
    assert who(None) == of_git
    for variable in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)
    assert who(None)["actor_from"] == f"operating system user{shared}"
    role(name, "not hers")
    with pytest.raises(MlflowException, match=r"401|not authenticated"):
        who(None)


def test_a_command_works_in_its_role_unless_the_user_has_a_login(servers, monkeypatch):
    private, public = Site.load(servers.root).signing_keys

    def connected(login: str | None, role: str) -> dict[str, str]:
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
        if login:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", login)
        return supervisor.connect(servers.root, start=False, role=role)

    trainer, reviewer = connected(None, TRAINER), connected(TRAINER, REVIEWER)
    assert (trainer["MLFLOW_TRACKING_USERNAME"], reviewer["MLFLOW_TRACKING_USERNAME"]) == (TRAINER, REVIEWER)
    assert PRIVATE_KEY not in trainer
    assert Path(reviewer[PRIVATE_KEY]) == private
    assert Path(trainer[PUBLIC_KEY]) == public
    assert connected(ADMIN, TRAINER)["MLFLOW_TRACKING_USERNAME"] == ADMIN  # who has said `eval "$(pedigree env)"`
    assert "MLFLOW_TRACKING_USERNAME" not in connected("rita", REVIEWER)
    assert connected("rita", REVIEWER)[PRIVATE_KEY] == str(private)
    assert os.stat(private).st_mode & 0o077 == 0


def test_on_s3_the_trainer_writes_nothing_that_is_released_and_deletes_no_event(servers):
    def s3(role: str):
        env = supervisor.environment(servers.root, role)
        keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], **keys)

    trainer, place = s3(TRAINER), {"Bucket": MODELS_BUCKET, "Key": "released/roles/MLmodel"}
    reviewer = s3(REVIEWER)
    version = reviewer.put_object(**place, Body=b"approved")["VersionId"]
    event, soon = {"Bucket": AUDIT_BUCKET, "Key": "events/locked-by-trainer"}, datetime.now(UTC) + timedelta(minutes=5)
    lock = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": soon}
    shorter = {"Mode": "GOVERNANCE", "RetainUntilDate": datetime.now(UTC) + timedelta(minutes=1)}
    unlocked = {"ObjectLockEnabled": "Enabled"}
    locked = trainer.put_object(**event, **lock, Body=b"x")["VersionId"]
    trainer.put_object(Bucket=DATA_BUCKET, Key="roles", Body=b"x")
    forbidden = (
        lambda: trainer.put_object(**place, Body=b"worse"),
        lambda: trainer.put_object(Bucket=MODELS_BUCKET, Key="released/roles/code.py", Body=b"import os"),
        lambda: trainer.delete_object(**place),
        lambda: trainer.delete_object(**place, VersionId=version),
        lambda: trainer.copy_object(**place, CopySource={"Bucket": DATA_BUCKET, "Key": "roles"}),
        lambda: trainer.create_multipart_upload(**place),
        lambda: trainer.put_bucket_versioning(Bucket=MODELS_BUCKET, VersioningConfiguration={"Status": "Suspended"}),
        lambda: reviewer.put_object(Bucket=DATA_BUCKET, Key="roles", Body=b"y"),
        lambda: reviewer.put_object(Bucket=MODELS_BUCKET, Key="mlflow/roles", Body=b"y"),
        *(
            attempt
            for client in (trainer, reviewer)
            for attempt in (
                partial(client.delete_object, **event),  # it would leave a marker
                partial(client.delete_object, **event, VersionId=locked),
                partial(client.delete_object, **event, VersionId=locked, BypassGovernanceRetention=True),
                partial(client.put_object_retention, **event, Retention=shorter, BypassGovernanceRetention=True),
                partial(client.put_object_retention, **event, Retention=shorter),
                partial(client.delete_bucket_policy, Bucket=AUDIT_BUCKET),
                partial(client.put_bucket_policy, Bucket=AUDIT_BUCKET, Policy=json.dumps(AUDIT_POLICY)),
                partial(client.put_object_lock_configuration, Bucket=AUDIT_BUCKET, ObjectLockConfiguration=unlocked),
            )
        ),
    )
    for attempt in forbidden:
        with pytest.raises(ClientError, match="AccessDenied"):
            attempt()
    trainer.delete_objects(Bucket=MODELS_BUCKET, Delete={"Objects": [{"Key": place["Key"]}]})  # says no for each key
    assert trainer.get_object(**place)["Body"].read() == b"approved"
    for client in (trainer, reviewer):
        client.delete_objects(Bucket=AUDIT_BUCKET, Delete={"Objects": [{"Key": event["Key"]}]})
    assert trainer.get_object(**event)["Body"].read() == b"x"
    # No policy can forbid a second version of a key; the first stays, and whoever reads the log is told.
    trainer.put_object(**event, **lock, Body=b"other")
    assert trainer.get_object(**event, VersionId=locked)["Body"].read() == b"x"


def test_a_run_registers_as_the_trainer_and_the_reviewer_promotes(servers, monkeypatch, tmp_path):
    name = f"roles-{uuid.uuid4().hex[:8]}"
    make_workspace(tmp_path / "run")
    for variable in ("MLFLOW_TRACKING_USERNAME", PRIVATE_KEY):
        monkeypatch.delenv(variable)
    for role in (TRAINER, REVIEWER):
        for variable, value in supervisor.connect(servers.root, start=False, role=role).items():
            monkeypatch.setenv(variable, value)
        if role == TRAINER:
            assert with_alias(MlflowClient(), name, "champion") is None  # the first question of a first run
            stage.run(CONFIG, tmp_path / "run", 7, name)
            with pytest.raises(PedigreeError, match=f"{PRIVATE_KEY} is not set"):
                promote(f"{name}@latest", "a trainer's own", tmp_path / "run", TRACE)
        else:
            with pytest.raises(PedigreeError, match="no such version"):
                promote(f"{name}-none@latest", "good")
            assert promote(f"{name}@latest", "good", tmp_path / "run", TRACE).version == f"{name}/1"
    assert [entry.subject for entry in AuditLog.from_environment().read(name)] == [f"{name}/1"]
