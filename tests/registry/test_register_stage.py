"""Registering on the real services: what the version states, and that anyone can load and run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from components.core.storage import sha256_file
from components.lineage.audit_anchors import TAG
from components.lineage.audit_log import AuditLog
from components.lineage.lock_file import RecordError, folder_id
from components.lineage.provenance import Tag, data_versions
from components.model.export import load_backbone
from components.registry import stage
from components.registry.publish import RegistryError
from components.registry.stage import teacher_of
from tests.registry.conftest import CONFIG, weights

pytestmark = pytest.mark.stack


def independent_embedding(weights: Path, image: Image.Image, resolution: int) -> np.ndarray:
    """In torch's arithmetic, and with its antialiased bicubic scaling: the way in is not the one under test."""
    short = round(resolution * 32 / 28)
    shape = [max(short, round(side * short / min(image.size))) for side in (image.height, image.width)]
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(whole, shape, mode="bicubic", antialias=True)[0]
    top, left = (shape[0] - resolution) // 2, (shape[1] - resolution) // 2
    pixels = scaled[:, top : top + resolution, left : left + resolution] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        tokens = load_backbone(weights)(((pixels - mean[:, None, None]) / std[:, None, None])[None])
    return tokens.cls_token[0].numpy()


def test_version_states_its_origin(finished):
    client, name, workspace = MlflowClient(), finished["name"], finished["root"]
    teacher = client.get_model_version(f"{name}-candidates", "1")
    student = client.get_model_version(f"{name}-small-candidates", "1")
    head = subprocess.check_output(["git", "-C", str(workspace), "rev-parse", "HEAD"], text=True).strip()
    assert teacher.tags[Tag.COMMIT] == head
    assert teacher.tags[Tag.BRANCH] == "runs/test"
    assert teacher.tags[Tag.DIRTY] == "false"
    assert teacher.tags[Tag.WEIGHTS_SHA256] == sha256_file(workspace / "models/adapted/model.safetensors")
    assert teacher.tags[Tag.PARENT_SHA256] == sha256_file(workspace / "models/pretrained/model.safetensors")
    assert student.tags[Tag.PARENT] == f"{name}-candidates/{teacher.version}"
    assert student.tags[Tag.PARENT_SHA256] == teacher.tags[Tag.WEIGHTS_SHA256]
    kept = [json.loads(version.tags[Tag.FILES]) for version in (teacher, student)]
    heads = "artifacts/weights/heads.safetensors"
    assert kept[0][heads] == sha256_file(workspace / "models/adapted/heads.safetensors")  # others may learn from it
    assert heads not in kept[1]
    assert teacher.tags[Tag.VALIDATION] == "passed for 1 of 1 snapshots of the pool"
    events = AuditLog.from_environment().read(f"{name}-candidates")  # once each, though the first was found again
    assert [(e.action, e.subject) for e in events] == [("register", f"{name}-candidates/{n}") for n in (1, 2, 3)]
    assert events[0].details["digest"] == teacher.tags[Tag.DIGEST]
    assert events[0].details["commit"] == head
    assert events[0].details["gates"]["random"][0] == "passed"
    anchored = client.get_registered_model(f"{name}-candidates").tags[TAG]
    assert anchored == f"{name}-candidates 3 {events[2].hash}"
    (pool,) = data_versions(teacher.tags, Tag.POOL)
    snapshot = workspace / "data/pool/photos/ab12"
    assert (pool.path, pool.dvc) == ("data/pool/photos/ab12", folder_id(snapshot))
    assert pool.manifest_sha256 == sha256_file(snapshot / "manifest.parquet")
    assert teacher.description.startswith(f"**{name}-candidates passes 10 of 11 gates, 1 at the decision.** There")
    assert "3 images; photos (CC0-1.0) 3." in teacher.description
    assert teacher.tags[Tag.VERDICT] == "passes 10 of 11 gates, 1 at the decision"
    assert teacher.tags[Tag.SCORE] == "knn_top1 0.7500"


def test_a_student_of_another_teacher_than_the_runs_names_it(finished, tmp_path: Path):
    client, name, workspace = MlflowClient(), finished["name"], finished["root"]
    sha256 = sha256_file(workspace / "models/adapted/model.safetensors")
    for teacher, parent in (
        ("models/adapted", None),
        (f"models:/{name}-candidates/1", (f"{name}-candidates/1", sha256)),
        (str(workspace / "models/adapted"), (str(workspace / "models/adapted"), sha256)),
    ):
        weights(tmp_path / "student", 5, 16, teacher)
        assert teacher_of(client, workspace, tmp_path / "student") == parent


def test_run_has_inputs_and_metrics_of_each_model(finished):
    client, name, workspace = MlflowClient(), finished["name"], finished["root"]
    version = client.get_model_version(f"{name}-candidates", "1")
    run = client.get_run(version.run_id)
    inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
    assert inputs["data/curated"].dataset.digest == folder_id(workspace / "data/curated")
    assert sha256_file(workspace / "data/curated/manifest.parquet") in {t.value for t in inputs["data/curated"].tags}
    metrics = {}
    for item in ("candidates", "small-candidates"):
        source = client.get_model_version(f"{name}-{item}", "1").source
        model = client.get_logged_model(source.removeprefix("models:/"))
        metrics[item] = {m.key: m.value for m in model.metrics}
    for item, value in (("candidates", 0.75), ("small-candidates", 0.5)):
        assert metrics[item]["knn_top1"] == value
        assert metrics[item]["random.knn_top1"] == 0.1
        assert metrics[item]["roads/slices.light_dark"] == 0.5
    assert finished["first"]["teacher"]["uri"] == f"models:/{name}-candidates/1"


def test_each_version_has_a_run_with_its_own_parameters_score_and_pages(finished):
    """MLflow compares versions by the parameters of their runs, and its lists sort by metrics and tags."""
    client, name = MlflowClient(), finished["name"]
    versions = {item: client.get_model_version(f"{name}-{item}", "1") for item in ("candidates", "small-candidates")}
    runs = {item: client.get_run(version.run_id) for item, version in versions.items()}
    teacher, small = runs["candidates"].data, runs["small-candidates"].data
    assert (teacher.tags["pedigree.item"], small.tags["pedigree.item"]) == ("teacher", "small")
    assert teacher.params == {"name": name, "adapt.steps": "800", "seed": "7"}
    assert small.params == {"name": name, "adapt.steps": "800", "distill.students.small.dim": "16", "seed": "7"}
    assert (teacher.metrics["knn_top1"], small.metrics["knn_top1"]) == (0.75, 0.5)
    assert teacher.tags[Tag.SCORE] == versions["candidates"].tags[Tag.SCORE]
    assert teacher.tags[Tag.VERDICT] == versions["candidates"].tags[Tag.VERDICT]
    assert "passport.html" in {file.path for file in client.list_artifacts(versions["candidates"].run_id)}
    place = f"#/experiments/{runs['candidates'].info.experiment_id}/runs/{versions['candidates'].run_id}/artifacts/"
    assert f"[passport]({place}passport.html)" in versions["candidates"].description


def test_a_candidate_without_a_champion_stands_beside_the_last_one(finished, tmp_path: Path):
    version = MlflowClient().get_model_version(f"{finished['name']}-candidates", "3")
    last = f"{finished['name']}-candidates/2"
    assert f"There is no champion yet; it is shown beside the last candidate before it, {last}." in version.description
    assert f"{last} 0.750, difference -0.250 (-0.309 to -0.186)" in version.description
    assert version.tags[Tag.VERDICT] == "passes 10 of 11 gates, 1 at the decision"
    assert f"[parameters beside {last}](#/compare-runs?runs=" in version.description
    (by_score,) = re.findall(r"\[all versions by knn_top1\]\(#/experiments/\d+/runs\?(.+)\)", version.description)
    assert "%2Fregister%40teacher%27&orderByKey=metrics.%60knn_top1%60&orderByAsc=false" in by_score
    page = MlflowClient().download_artifacts(version.run_id, "passport.html", str(tmp_path))
    text = Path(page).read_text()
    assert f"<h2>What differs from {last}</h2>" in text
    assert "<td>adapt.steps</td><td>800</td><td>20</td>" in text
    counts = '<td class="n">3</td><td class="n">0</td><td class="n">0</td><td class="n">3</td>'
    assert f"<td>photos</td><td>CC0-1.0</td>{counts}" in text


def test_loads_in_a_fresh_process_without_this_repository(finished, tmp_path: Path, photographs):
    """A copy of the interpreter's packages is in reach, our code is not: an import hook would give us away."""
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, json, importlib.util\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', str(f))]\n"
        "assert importlib.util.find_spec('components') is None, 'this repository is in reach'\n"
        "import mlflow, numpy as np, pandas as pd\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "frame = pd.DataFrame({'image': [open(p, 'rb').read() for p in sys.argv[3:]]})\n"
        "out = [model.predict(frame), model.predict(frame, params={'resolution': 49})]\n"
        "import components.model.vit\n"
        "assert 'site-packages' not in components.model.vit.__file__\n"
        "np.save(sys.argv[2], np.stack(out))\n"
    )
    for number, data in enumerate(photographs):
        (tmp_path / f"{number}.png").write_bytes(data)
    images = [tmp_path / f"{number}.png" for number in range(len(photographs))]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "MLFLOW_RUN_ID"}}
    command = [
        sys.executable,
        str(script),
        finished["first"]["teacher"]["uri"],
        str(tmp_path / "out.npy"),
        *map(str, images),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npy")  # [resolution, image, D]
    assert found.dtype == np.float32
    for resolution, embeddings in zip((28, 49), found, strict=True):
        for path, embedding in zip(images, embeddings, strict=True):
            expected = independent_embedding(finished["root"] / "models/adapted", Image.open(path), resolution)
            np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-4)


def test_no_pickle_and_a_working_example(finished, tmp_path: Path):
    import mlflow

    (tmp_path / "model").mkdir()
    folder = Path(
        mlflow.artifacts.download_artifacts(finished["first"]["small"]["uri"], dst_path=str(tmp_path / "model"))
    )
    files = [p for p in folder.rglob("*") if p.is_file()]
    suffixes = {".py", ".json", ".yaml", ".txt", ".md", ".html", ".safetensors", ".parquet", ".jsonl", ""}
    assert {p.suffix for p in files} <= suffixes
    assert not [p for p in files if p.read_bytes()[:1] == b"\x80" or p.read_bytes()[:2] == b"PK"]
    assert (folder / "artifacts/card.md").read_text().startswith("**test-")
    assert "Nobody has decided on it yet." in (folder / "artifacts/passport.html").read_text()
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)
    assert {"torch", "safetensors", "pillow", "numpy"} <= {line.split("==")[0] for line in requirements}
    model = mlflow.pyfunc.load_model(str(folder))
    example, params = model.input_example, None
    frame = example[0] if isinstance(example, tuple) else example
    assert model.predict(frame, params=params).shape == (1, 16)
    with pytest.raises(ValueError, match="row 1: not a usable image"):
        model.predict(pd.DataFrame({"image": [frame["image"][0], b"text"]}))
    with pytest.raises(ValueError, match="resolution 30: must be a multiple of the patch size, 7"):
        model.predict(frame, params={"resolution": 30})


def test_the_same_weights_and_scores_are_the_same_version(finished):
    assert finished["again"] == finished["first"]
    assert [finished[key]["teacher"]["version"] for key in ("first", "newer")] == ["1", "2"]
    latest = MlflowClient().get_model_version_by_alias(f"{finished['name']}-candidates", "latest")
    assert latest.version == "3"


def test_refuses_weights_that_are_not_the_recorded_ones(stack, workspace: Path, name: str):
    (workspace / "models/adapted/config.json").write_text("{}")
    with pytest.raises(RecordError, match=r"not the bytes that dvc\.lock records"):
        stage.run(CONFIG, workspace, 7, name)


def test_refuses_without_evaluation(stack, workspace: Path, name: str):
    (workspace / "reports/evaluate/teacher/result.json").unlink()
    with pytest.raises(RegistryError, match=r"result\.json: no such file"):
        stage.run(CONFIG, workspace, 7, name)


def test_refuses_without_a_server(workspace: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI is not set"):
        stage.run(CONFIG, workspace, 7, name)
