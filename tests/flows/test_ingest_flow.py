"""The ingest flow beyond one folder: held-out images, an evaluation source, the event that starts retraining."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock
from PIL import Image
from prefect.client.orchestration import get_client
from skimage import data
from typer.testing import CliRunner

from components.data.ingest_config import IngestRequest
from components.data.manifest import read_collection
from components.lineage.audit_log import PLATFORM, AuditLog
from flows.announce import LISTENER, POOL_GROWN
from flows.cli import app
from flows.ingest import ingest as ingest_flow
from infra.local.services import request
from tests.flows.repository import DVC, PROJECT, make_repository, pedigree_command

pytestmark = pytest.mark.stack


def prefect(path: str, body: Any) -> Any:
    url = os.environ["PREFECT_API_URL"].removesuffix("/api")
    return request(url, f"/api{path}", os.environ["PREFECT_API_AUTH_STRING"], "POST", body)


def grown(source: str) -> list[dict[str, Any]]:
    names = {"any_resource": {"id": [f"pedigree.pool.{source}"]}, "event": {"name": [POOL_GROWN]}}
    return prefect("/events/filter", {"filter": names})["events"]


def announced(source: str) -> list[dict[str, Any]]:
    """The events, once Prefect has written the first of them."""
    until = time.monotonic() + 60
    while not (events := grown(source)) and time.monotonic() < until:
        time.sleep(0.2)
    return events


def ingest(source: Path, name: str, *options: str) -> str:
    """What the command prints that ingests into the current folder; test_ingest_command runs it as a process."""
    done = CliRunner().invoke(app, ["ingest", str(source), "--name", name, "--license", "CC0-1.0", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """40 tiles of one photograph, each its own image."""
    folder = tmp_path_factory.mktemp("photos")
    picture = Image.fromarray(np.asarray(data.astronaut()))
    for number in range(40):
        left, top = 60 * (number % 8), 90 * (number // 8)
        picture.crop((left, top, left + 60, top + 90)).save(folder / f"{number}.png")
    return folder


def test_new_images_are_held_out_by_content_tracked_and_announced(stack, tmp_path, photos, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)
    report = json.loads(ingest(photos, "flow-shots", "--holdout", "0.25", "--json"))
    assert report["seen"] == 40
    assert report["stored"] + report["held_out"] == 40
    assert 3 <= report["held_out"] <= 18
    ids = {}
    for key, collection in (("pool_snapshot", "pool"), ("evaluation_snapshot", "evaluation")):
        snapshot = root / report[key]
        assert snapshot.parent == root / "data" / collection / "flow-shots"
        table = read_collection(root / "data" / collection)
        ids[collection] = set(
            table.filter([s == "flow-shots" for s in table["source"].to_pylist()])["image_id"].to_pylist()
        )
        tracked = subprocess.run(
            [DVC, "status", f"{snapshot}.dvc", "--json"], cwd=root, capture_output=True, check=True
        )
        assert json.loads(tracked.stdout) == {}
    assert not ids["pool"] & ids["evaluation"]
    assert (len(ids["pool"]), len(ids["evaluation"])) == (report["stored"], report["held_out"])

    (told,) = report["retraining"]
    assert (told["images"], told["flow_run"]) == (report["stored"], None)
    assert "no deployment retrain/on-new-images; `prefect deploy --all` makes it" in told["note"]
    assert [event["payload"]["images"] for event in announced("flow-shots")] == [report["stored"]]

    note = Path("flow-shots") / Path(report["pool_snapshot"]).name  # as if killed after sending, before noting it
    (root / ".pedigree/announced" / note).rename(root / ".pedigree/unannounced" / note)
    again = ingest_flow(IngestRequest.parse(source=str(photos), name="flow-shots", license="CC0-1.0", holdout=0.25))
    assert again.report.already_present == 40
    assert (again.report.pool_snapshot, again.report.evaluation_snapshot) == (None, None)
    assert again.retraining[0].note.startswith("an ingest that was cut short had sent the event")
    assert len(grown("flow-shots")) == 1
    (event,) = (entry for entry in AuditLog.from_environment().read(PLATFORM) if entry.subject == "flow-shots")
    assert (event.action, event.details["counts"]["seen"], event.details["validation"]) == ("ingest", 40, "passed")
    stored = yaml.safe_load((root / f"{report['pool_snapshot']}.dvc").read_text())["outs"][0]["md5"]
    assert event.details["data"][report["pool_snapshot"]] == stored
    assert len(event.details["data"]) == 2


def test_an_evaluation_source_adds_nothing_to_the_pool_and_starts_nothing(stack, tmp_path, photos, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)
    wanted = IngestRequest.parse(source=str(photos), name="flow-benchmark", license="CC0-1.0", as_evaluation=True)
    report = ingest_flow(wanted).report
    assert (report.stored, report.pool_snapshot) == (40, None)
    assert not (root / "data/pool/flow-benchmark").exists()
    assert report.evaluation_snapshot is not None
    assert (root / f"{report.evaluation_snapshot}.dvc").exists()
    assert grown("flow-benchmark") == []


def test_what_an_unfinished_ingest_stored_is_announced_once_by_the_next(stack, tmp_path, photos, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)

    def dvc(*arguments: str) -> None:
        subprocess.run([DVC, "remote", "modify", *arguments], cwd=root, check=True, capture_output=True)

    dvc("storage", "url", f"s3://pedigree-data/{tmp_path.name}")
    dvc("storage", "endpointurl", stack.env["AWS_ENDPOINT_URL"])
    dvc("--local", "storage", "access_key_id", "refused")
    dvc("--local", "storage", "secret_access_key", "refused")
    wanted = IngestRequest.parse(source=str(photos), name="flow-cut", license="CC0-1.0")
    failed = ingest_flow(wanted, return_state=True)
    assert failed.is_failed()
    assert "DVC" in failed.message
    (snapshot,) = (path for path in (root / "data/pool/flow-cut").iterdir() if path.is_dir())
    assert grown("flow-cut") == []

    snapshot.with_name(f"{snapshot.name}.dvc").unlink()  # as if killed before `dvc add`
    (root / ".pedigree/unannounced/flow-cut" / snapshot.name).unlink()
    (root / ".dvc/config.local").unlink()
    done = ingest_flow(wanted)
    assert (done.report.stored, done.report.already_present) == (0, 40)
    assert [(told.snapshot, told.images) for told in done.retraining] == [(snapshot.name, 40)]
    assert snapshot.with_name(f"{snapshot.name}.dvc").exists()
    assert [event["payload"]["images"] for event in announced("flow-cut")] == [40]
    assert ingest_flow(wanted).retraining == ()
    assert len(grown("flow-cut")) == 1


@pytest.fixture
def listener(stack, tmp_path) -> Iterator[str]:
    """The deployment of prefect.yaml that waits for new images, on a work pool without a worker; its id."""
    program, pool = str(Path(sys.executable).with_name("prefect")), "idle"
    prefect("/work_pools/", {"name": pool, "type": "process", "base_job_template": {}})
    deploy = [program, "--no-prompt", "deploy", "--name", "on-new-images", "--pool", pool]
    subprocess.run(deploy, cwd=PROJECT, check=True, capture_output=True, text=True)
    (found,) = prefect("/deployments/filter", {"deployments": {"name": {"any_": ["on-new-images"]}}})
    yield found["id"]
    with get_client(sync_client=True) as client:  # which asks again where the server's database is busy
        client.delete_deployment(found["id"])
        client.delete_work_pool(pool)


def test_the_retraining_that_new_images_start_is_named(stack, listener, tmp_path, photos, monkeypatch):
    monkeypatch.chdir(make_repository(tmp_path))
    said = ingest(photos, "flow-told")
    (run,) = prefect("/flow_runs/filter", {"deployments": {"id": {"any_": [listener]}}})
    page = stack.env["PREFECT_API_URL"].removesuffix("/api")
    started = f"40 new images start a retraining: deployment retrain/on-new-images, {page}/runs/flow-run/{run['id']}"
    assert f"{started}; it waits for a worker: `prefect worker start --pool idle`" in said


def test_an_ingest_waits_for_another_and_no_retrain_holds_for_later_ones(stack, tmp_path, photos, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)
    (root / ".pedigree").mkdir()
    holder = root / ".pedigree/pool.lock"
    with FileLock(holder), (tmp_path / "said").open("w+") as said:
        holder.write_text("the ingest of others (process 7, since yesterday)")
        arguments = pedigree_command(
            "ingest", str(photos), "--name", "flow-wait", "--license", "CC0-1.0", "--no-retrain"
        )
        waiting = subprocess.Popen(arguments, stdout=said, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert any("waiting for the ingest of others (process 7, since yesterday)" in line for line in waiting.stderr)
        assert not (root / "data/pool/flow-wait").exists()
        holder.write_text("")
    told = waiting.communicate(timeout=120)[1]
    assert waiting.returncode == 0, told
    assert holder.read_text().startswith(f"the ingest of flow-wait (process {waiting.pid}, since 20")
    assert "no retraining starts, now or by a later ingest (--no-retrain)" in (tmp_path / "said").read_text()
    wanted = IngestRequest.parse(source=str(photos), name="flow-wait", license="CC0-1.0")
    assert ingest_flow(wanted).retraining == ()


def test_the_deployment_waits_for_the_event_that_is_sent():
    (named,) = (each for each in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
                if LISTENER.endswith(f"/{each['name']}"))  # fmt: skip
    assert named["triggers"][0]["expect"] == [POOL_GROWN]
