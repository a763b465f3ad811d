"""A purge removes pictures of a run from a real MLflow and a real Prefect, and from what lies below them."""

from __future__ import annotations

import io
import os
import uuid
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from mlflow import MlflowClient
from PIL import Image
from prefect.client.orchestration import get_client

from components.core import stage_runs
from components.core.storage import write_bytes
from components.lineage import purge as purge_steps
from components.lineage.residue import Needles, Searched, needle, search_s3
from flows.purge import remove_prefect_pictures
from tests.flows.repository import IDENTITY, git_lines


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(skimage.data.astronaut())[:64, :72]).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.stack
def test_pictures_of_a_run_are_removed_from_mlflow_and_prefect(servers, tmp_path: Path):
    run, name = "20261130-040000-abcd", f"pictures-{uuid.uuid4().hex[:8]}"
    git_lines(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "params.yaml").write_text(f"name: {name}\n")
    git_lines(tmp_path, "add", "-A")
    git_lines(tmp_path, *IDENTITY, "commit", "-q", "-m", "start")
    sheet = photo()
    mlflow_run, client = stage_runs.open_parent(run, name, {}), MlflowClient()
    for path in ("kept.jpg", "result.json"):
        write_bytes(tmp_path / path, sheet if path == "kept.jpg" else b"{}")
        client.log_artifact(str(mlflow_run), str(tmp_path / path))
    with get_client(sync_client=True) as prefect:
        flow_id = prefect.request("POST", "/flows/", json={"name": name}).json()["id"]
        of = prefect.request("POST", "/flow_runs/", json={"flow_id": flow_id, "name": run}).json()["id"]
        for key, text in (("kept", f"![](data:image/jpeg;base64,{b64encode(sheet).decode()})"), ("funnel", "text")):
            body = {"key": f"{name}-{key}", "type": "markdown", "data": text, "flow_run_id": of}
            prefect.request("POST", "/artifacts/", json=body)
    # Written by the server within seconds, and then in its database or the log beside it.
    database = servers.root / ".pedigree/prefect/prefect.db"
    mark = b64encode(sheet)[600:660]

    def stored() -> bool:
        return any(mark in path.read_bytes() for path in database.parent.glob("prefect.db*"))

    assert stored()
    count, notes = purge_steps.remove_mlflow_pictures(tmp_path, client, [run])
    assert (count, notes) == (1, [])
    assert [file.path for file in client.list_artifacts(str(mlflow_run))] == ["result.json"]
    assert remove_prefect_pictures(database, [run]) == (1, [])
    assert not stored()
    models = f"s3://{os.environ['PEDIGREE_MODELS_BUCKET']}/mlflow"
    assert search_s3(models, Needles([needle(sheet)]), Searched()) == []
