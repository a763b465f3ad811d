"""A finished run's workspace: tiny weights, a curated set of real photographs, reports, a DVC record, a git commit."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
import yaml
from PIL import Image

from components.data.manifest import CURATED_SCHEMA, POOL_SCHEMA, write_manifest
from components.data.shards import ShardWriter
from components.lineage.lock_file import folder_id
from components.model.config import HeadConfig, Preprocessing, ViTConfig
from components.model.export import save_weights
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.registry import stage
from components.registry.config import RegisterConfig
from components.registry.promote import Decision, promote

PATCH = 7
CONFIG = RegisterConfig(preprocessing=Preprocessing(resize_size=32, crop_size=28))
TRACE = {"lineage": "the workspace of these tests has no storage"}
TESTED = [f"{number:064x}" for number in range(200)]  # ids of evaluation images
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def own_code_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a loaded model's copy of our code off the import path again; worker processes of later tests inherit it."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def encoded(image: np.ndarray, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


PHOTOGRAPHS = [
    encoded(skimage.data.astronaut(), (70, 70)),
    encoded(skimage.data.chelsea(), (90, 60)),
    encoded(skimage.data.coffee(), (50, 80)),
]


def weights(folder: Path, seed: int, dim: int, teacher: str | None = None) -> None:
    torch.manual_seed(seed)
    config = ViTConfig(patch_size=PATCH, dim=dim, depth=2, num_heads=2, image_size=28, num_registers=1)
    shape = HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    heads = {name: ProjectionHead(dim, shape) for name in ("dino", "ibot")}
    provenance: dict[str, Any] = {"seed": seed}
    if teacher is not None:
        provenance["config"] = {"teacher_weights": teacher}
    save_weights(folder, VisionTransformer(config), heads, provenance)


def telling_weights(folder: Path, shape: ViTConfig) -> None:
    """Weights of which every tensor matters: at first, layer scales hide the blocks, and biases are zero."""
    torch.manual_seed(0)
    backbone = VisionTransformer(shape)
    for tensor in backbone.parameters():
        torch.nn.init.normal_(tensor, std=0.2)
    save_weights(folder, backbone, None, {})


def write_data(folder: Path, curated: bool) -> None:
    folder.mkdir(parents=True)
    rows = []
    with ShardWriter(folder, 1 << 20) as writer:
        for data in sorted(PHOTOGRAPHS, key=lambda d: hashlib.sha256(d).hexdigest()):
            image_id = hashlib.sha256(data).hexdigest()
            shard, offset, length = writer.add(image_id, "png", data)
            row = {"image_id": image_id, "shard": shard, "offset": offset, "length": length, "format": "PNG"}
            row |= {"width": 50, "height": 50, "source": "photos", "source_uri": f"file://{image_id}"}
            row |= {"license": "CC0-1.0", "label": None, "split": None}
            if curated:
                row |= {"origin": "balanced", "query_id": None, "similarity": None, "group_id": image_id}
                row |= {"cluster_path": "0"}
            rows.append(row)
    schema = CURATED_SCHEMA if curated else POOL_SCHEMA
    write_manifest(pa.Table.from_pylist(rows, schema=schema), folder / "manifest.parquet")


def record(root: Path) -> None:
    """Write `dvc.lock` and the pool's `.dvc` file for what is on disk, in DVC's form."""

    def out(path: str) -> dict[str, str]:
        return {"path": path, "hash": "md5", "md5": folder_id(root / path)}

    curated, teacher = [out("data/curated")], [out("models/adapted")]
    evaluation = [{"path": "data/evaluation", "hash": "md5", "md5": f"{7:032x}.dir"}]
    stages = {
        "embed": {"cmd": "python -m components embed", "deps": evaluation},
        "curate": {"cmd": "python -m components curate", "outs": curated},
        "adapt": {"cmd": "python -m components adapt", "deps": curated, "outs": teacher},
        "distill": {"cmd": "python -m components distill", "deps": teacher, "outs": [out("models/students")]},
        "evaluate@teacher": {"cmd": "python -m components evaluate teacher", "deps": [*evaluation, *teacher]},
        "evaluate@small": {
            "cmd": "python -m components evaluate small",
            "deps": [*evaluation, out("models/students/small")],
        },
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    snapshot = {"md5": folder_id(root / "data/pool/photos/ab12"), "hash": "md5", "path": "ab12"}
    (root / "data/pool/photos/ab12.dvc").write_text(yaml.safe_dump({"outs": [snapshot]}))


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run(["git", *identity, "-C", str(root), *arguments], check=True, capture_output=True)


def write_params(root: Path, steps: int) -> None:
    """The run's parameters, as far as the weights depend on them."""
    params = {"seed": 7, "adapt": {"steps": steps}, "distill": {"students": {"small": {"dim": 16}}}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def commit(root: Path, message: str) -> None:
    git(root, "add", "dvc.lock", "params.yaml", "data/pool/photos/ab12.dvc")
    git(root, "commit", "-q", "-m", message)


def make_workspace(root: Path) -> None:
    write_data(root / "data/pool/photos/ab12", curated=False)
    (root / "data/pool/photos/ab12/summary.html").write_text("<!doctype html>")
    write_data(root / "data/curated", curated=True)
    weights(root / "models/pretrained", 1, 32)
    weights(root / "models/adapted", 2, 32)
    weights(root / "models/students/small", 3, 16)
    for item, top1 in (("teacher", 0.75), ("small", 0.5)):
        write_report(root, item, top1)
    git(root, "init", "-q", "-b", "runs/test")
    write_params(root, 800)
    record(root)
    commit(root, "A run")


def write_report(root: Path, model: str, top1: float) -> None:
    """Results as the evaluation writes them, on 200 test images of which the share `top1` is right."""
    folder = root / "reports/evaluate" / model
    folder.mkdir(parents=True, exist_ok=True)
    above = {"knn_top1": {"mean": top1 - 0.1, "low": top1 - 0.2, "high": top1}}
    result = {"knn_top1": top1, "random": {"knn_top1": 0.1}, "minus_random": above, "note": "not a number"}
    result["roads/slices.light=dark"] = 0.5  # a name with a character that MLflow refuses
    (folder / "result.json").write_text(json.dumps(result))
    right = [float(number < top1 * len(TESTED)) for number in range(len(TESTED))]
    columns = {"image_id": TESTED, "model": [model] * len(TESTED), "metric": ["knn_top1"] * len(TESTED)}
    pq.write_table(pa.table({**columns, "value": right}), folder / "by_image.parquet")


def change_teacher(root: Path, seed: int, top1: float = 0.75) -> None:
    """Make other teacher weights in the workspace, as another run would, and commit the record."""
    write_report(root, "teacher", top1)
    weights(root / "models/adapted", seed, 32)
    record(root)
    commit(root, f"A run with seed {seed}")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    make_workspace(tmp_path / "workspace")
    return tmp_path / "workspace"


@pytest.fixture(scope="session")
def finished(stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models registered once, for tests that change nothing: twice the same, then newer teachers, as good and worse."""
    root, name = tmp_path_factory.mktemp("finished"), new_name()
    make_workspace(root)
    first = stage.run(CONFIG, root, 7, name)
    again = stage.run(CONFIG, root, 7, name)
    earlier = root.with_name(f"{root.name}-earlier")
    shutil.copytree(root, earlier)
    change_teacher(root, 9)
    newer = stage.run(CONFIG, root, 7, name)
    write_params(root, 20)
    change_teacher(root, 11, 0.5)
    stage.run(CONFIG, root, 7, name)
    return {"root": earlier, "latest": root, "name": name, "first": first, "again": again, "newer": newer}


def decide(finished: dict[str, Any], reference: str, reason: str = "r", **waivers: str) -> Decision:
    """Promote, with what these made-up workspaces cannot have waived."""
    return promote(reference, reason, finished["latest"], TRACE | waivers)


def new_name() -> str:
    return f"test-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def name() -> str:
    return new_name()


@pytest.fixture
def photographs() -> list[bytes]:
    return PHOTOGRAPHS
