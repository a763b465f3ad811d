"""The ingest flow beyond one folder: held-out images, an evaluation source, the event that starts retraining."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from components.data.manifest import read_collection
from flows.ingest import POOL_GROWN
from tests.flows.repository import DVC, PROJECT, make_repository, pedigree

pytestmark = pytest.mark.stack


def prefect(path: str, body: dict[str, Any]) -> Any:
    token = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def grown(source: str) -> list[dict[str, Any]]:
    names = {"any_resource": {"id": [f"pedigree.pool.{source}"]}, "event": {"name": [POOL_GROWN]}}
    return prefect("/events/filter", {"filter": names})["events"]


def ingest(root: Path, source: Path, name: str, *options: str) -> dict[str, Any]:
    done = pedigree(root, "ingest", str(source), "--name", name, "--license", "CC0-1.0", "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """40 tiles of one photograph, each its own image."""
    folder = tmp_path_factory.mktemp("photos")
    picture = Image.fromarray(np.asarray(data.astronaut()))
    for number in range(40):
        left, top = 60 * (number % 8), 90 * (number // 8)
        picture.crop((left, top, left + 60, top + 90)).save(folder / f"{number}.png")
    return folder


def test_new_images_are_held_out_by_content_tracked_and_announced(stack, tmp_path, photos):
    root = make_repository(tmp_path)
    report = ingest(root, photos, "flow-shots", "--holdout", "0.25")
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

    until = time.monotonic() + 15
    while not (events := grown("flow-shots")) and time.monotonic() < until:
        time.sleep(0.2)
    assert [event["payload"]["images"] for event in events] == [report["stored"]]
    again = ingest(root, photos, "flow-shots", "--holdout", "0.25")
    assert (again["already_present"], again["pool_snapshot"], again["evaluation_snapshot"]) == (40, None, None)
    assert len(grown("flow-shots")) == 1  # nothing new, nothing announced


def test_an_evaluation_source_adds_nothing_to_the_pool_and_starts_nothing(stack, tmp_path, photos):
    root = make_repository(tmp_path)
    report = ingest(root, photos, "flow-benchmark", "--evaluation")
    assert (report["stored"], report["pool_snapshot"]) == (40, None)
    assert not (root / "data/pool/flow-benchmark").exists()
    assert (root / f"{report['evaluation_snapshot']}.dvc").exists()
    assert grown("flow-benchmark") == []


def test_an_ingest_that_was_cut_short_before_tracking_is_completed(stack, tmp_path, photos):
    root = make_repository(tmp_path)
    report = ingest(root, photos, "flow-cut")
    pointer = root / f"{report['pool_snapshot']}.dvc"
    recorded = pointer.read_text()
    pointer.unlink()
    assert ingest(root, photos, "flow-cut")["stored"] == 0
    assert pointer.read_text() == recorded


def test_the_deployment_waits_for_the_event_that_is_sent():
    assert f"{POOL_GROWN}" in (PROJECT / "prefect.yaml").read_text()
