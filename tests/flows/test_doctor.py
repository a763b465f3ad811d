"""`pedigree doctor` with real services: green where all is well, one red line for each thing that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import boto3
import pytest
from prefect.client.orchestration import get_client

from components.core.signing import PUBLIC_KEY
from components.core.user import TRAINER
from flows import health
from flows.health import GREEN, RED, YELLOW, Finding, databases, packages, python
from infra.local import supervisor
from tests.flows.repository import copy_of_project, pedigree

DEPLOYMENTS = ("retrain/weekly", "retrain/on-new-images", "ingest/ingest")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_of_project(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def deployed(stack, checkout) -> Iterator[None]:
    """The deployments of prefect.yaml in the shared Prefect, where they would hear the events of other tests."""
    prefect = str(Path(sys.executable).with_name("prefect"))
    run = partial(subprocess.run, cwd=checkout, check=True, capture_output=True, text=True)
    try:
        run([prefect, "--no-prompt", "deploy", "--all"])
        run([sys.executable, "-m", "infra.automations"])
        yield
    finally:
        with get_client(sync_client=True) as client:
            for name in DEPLOYMENTS:
                client.delete_deployment(client.read_deployment_by_name(name).id)


def doctor(checkout: Path, **env: str) -> tuple[int, dict[str, Finding]]:
    done = pedigree(checkout, "doctor", "--json", env=env)
    assert "Traceback" not in done.stderr
    return done.returncode, {found["check"]: Finding(**found) for found in json.loads(done.stdout)}


def versions(bucket: str, endpoint: str) -> list[str]:
    answer = boto3.client("s3", endpoint_url=endpoint).list_object_versions(Bucket=bucket, Prefix=".doctor")
    return [version["Key"] for version in (*answer.get("Versions", []), *answer.get("DeleteMarkers", []))]


@pytest.mark.stack
def test_all_is_green_where_all_is_well_and_no_probe_stays(stack, checkout, deployed):
    code, found = doctor(checkout, **supervisor.environment(stack.root, TRAINER))  # as runs work
    waits = {"retrain/weekly: schedule"}  # the scheduler may not have looked at it yet, just deployed
    assert {name: one for name, one in found.items() if one.state == RED} == {}
    assert {name for name, one in found.items() if one.state == YELLOW} <= {"versions", "disk", *waits}
    assert code == 0
    assert {"Python", "packages", "git", "S3", "clock", "data bucket", "models bucket", "audit bucket", "DVC remote",
            "signing keys", "MLflow", "Prefect", "work pool", "worker", *DEPLOYMENTS, *waits, "automations",
            "retrain/on-new-images: trigger", "late runs"} <= set(found)  # fmt: skip
    for role in ("data", "models", "audit"):
        assert versions(f"pedigree-{role}", stack.env["AWS_ENDPOINT_URL"]) == []


@pytest.mark.stack
def test_each_service_that_is_down_or_refuses_is_one_red_line(stack, checkout):
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong", "PREFECT_API_AUTH_STRING": "a:b", PUBLIC_KEY: "/none.pem"}
    code, found = doctor(checkout, **wrong, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    red = {name: one.detail for name, one in found.items() if one.state == RED}
    assert code == 1
    assert set(red) == {"S3", "DVC remote", "signing keys", "MLflow", "Prefect"}
    assert red["signing keys"].startswith(f"{PUBLIC_KEY}=/none.pem: no such file")
    assert "access denied (SignatureDoesNotMatch)" in red["S3"]
    assert "Forbidden" in red["DVC remote"]
    assert "http://127.0.0.1:9 or the storage behind it does not answer" in red["MLflow"]
    assert red["Prefect"].endswith("/api: Client error '401 Unauthorized'")
    assert all("\n" not in detail for detail in red.values())


@pytest.mark.stack
def test_without_deployments_or_worker_it_says_what_to_type(stack, monkeypatch):
    with get_client(sync_client=True) as client:
        wanted = {"name": "never-deployed", "entrypoint": "flows/retrain.py:retrain"}
        (missing,) = health._deployment(client, wanted)
        assert (missing.state, missing.advice.split(" (")[0]) == (RED, "`prefect deploy --all`")
        monkeypatch.setattr(health, "WORK_POOL", "nowhere")
        assert health._worker(client).advice.startswith("`prefect worker start --pool nowhere`")
        assert health._work_pool(client).advice == "`prefect work-pool create nowhere --type process`"


@pytest.mark.stack
def test_an_active_schedule_without_a_run_to_come_is_red(stack, checkout, deployed, monkeypatch):
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("retrain/weekly")
        over = {"rrule": "DTSTART:20200101T000000Z\nRRULE:FREQ=DAILY;COUNT=1", "timezone": "UTC"}
        for schedule in found.schedules:
            client._client.delete(f"/deployments/{found.id}/schedules/{schedule.id}").raise_for_status()
        none = client.read_deployment(found.id)
        assert health._schedule(client, "weekly", none).detail == "no schedule is active"
        body = [{"schedule": over, "active": True}]
        client._client.post(f"/deployments/{found.id}/schedules", json=body).raise_for_status()
        found = client.read_deployment(found.id)
        assert health._schedule(client, "weekly", found).state == YELLOW
        monkeypatch.setattr(health, "SCHEDULER_GRACE", timedelta(0))
        assert health._schedule(client, "weekly", found).detail == "active, but no run is scheduled"


def test_packages_and_python_are_compared_with_the_project(tmp_path):
    text = '[project]\nrequires-python = "{}"\ndependencies = ["{}", "mlflow[auth]", "pytest"]\n'
    (tmp_path / "pyproject.toml").write_text(text.format(">=3.11", "sqlalchemy<2.1"))
    assert [one.state for one in (*python(tmp_path), *packages(tmp_path))] == [GREEN, GREEN]
    (tmp_path / "pyproject.toml").write_text(text.format("<3", "sqlalchemy<1"))
    (old,), (wrong,) = python(tmp_path), packages(tmp_path)
    assert (old.state, wrong.state) == (RED, RED)
    assert "allowed: <1" in wrong.detail
    (tmp_path / "pyproject.toml").write_text(text.format(">=3", "no-such-package"))
    assert next(packages(tmp_path)).detail == "no-such-package is not installed"


@pytest.mark.parametrize(
    ("variable", "uri", "state"),
    [
        ("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://u:p@db/mlflow", GREEN),
        ("MLFLOW_BACKEND_STORE_URI", "postgresql+asyncpg://u:p@db/mlflow", RED),
        ("MLFLOW_BACKEND_STORE_URI", "postgresql+no://u:p@db/mlflow", RED),
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://u:p@db/prefect", GREEN),
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://u:p@db/prefect", RED),
    ],
)
def test_a_servers_database_needs_the_scheme_that_it_understands(variable, uri, state, monkeypatch):
    monkeypatch.setenv(variable, uri)
    (found,) = databases(Path())
    assert found.state == state
    assert "u:p" not in found.detail
