"""What a student and its teachers had seen, from a repository, a registry and a remote alone; against the batches."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.storage import s3_client, write_json
from components.data.config import StreamConfig
from components.data.manifest import MANIFEST, read_manifest
from components.data.shards import ShardReader
from components.data.stream import ImageStream
from components.lineage.lock_file import RecordError, file_md5, folder_id
from components.lineage.provenance import Tag, collect_origin
from components.lineage.seen import read_history, steps_with
from flows.cli import app
from tests.data.test_stream import write_set

pytestmark = pytest.mark.stack

STREAM = StreamConfig(num_workers=0, window_shards=2, mix={"seed": 0.25, "balanced": 0.75})
STUDENT, ADAPTED, PRETRAINED = "models/students/small", "models/adapted", "models/pretrained"
TRAININGS = {STUDENT: (3, 8, 0), ADAPTED: (5, 8, 1), PRETRAINED: (6, 16, 0)}  # steps, images a step, seed


@dataclass
class Case:
    root: Path
    name: str
    drawn: dict[str, list[str]]  # of each training, the images in order
    images: dict[str, bytes]


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments], cwd=root, check=True)


def push(root: Path, folder: str, prefix: str) -> dict[str, str]:
    """Put a folder's files and listing where DVC puts them; its entry in `dvc.lock`."""
    files = sorted(path for path in (root / folder).rglob("*") if path.is_file())
    entries = [{"md5": file_md5(path), "relpath": path.relative_to(root / folder).as_posix()} for path in files]
    held = {entry["md5"]: (root / folder / entry["relpath"]).read_bytes() for entry in entries}
    held[folder_id(root / folder)] = json.dumps(entries).encode()
    for md5, data in held.items():
        key = f"{prefix}/files/md5/{md5[:2]}/{md5[2:]}"
        s3_client().put_object(Bucket=os.environ["PEDIGREE_DATA_BUCKET"], Key=key, Body=data)
    return {"path": folder, "md5": folder_id(root / folder)}


def write_weights(root: Path, path: str, digest: str, **config: Any) -> None:
    """Of a weights folder what an auditor reads: its `config.json`, as training writes it."""
    steps, size, seed = TRAININGS[path]
    stage = {STUDENT: "distill/small", ADAPTED: "adapt", PRETRAINED: "pretrain"}[path]
    values = {"stream": STREAM.model_dump(mode="json"), "batch_size": size, **config}
    provenance = {"stage": stage, "config": values, "seed": seed, "dataset_sha256": digest, "steps": steps}
    write_json(root / path / "config.json", {"provenance": provenance})
    (root / path / "model.safetensors").write_bytes(path.encode())


@pytest.fixture(scope="module", params=["distill", "distill@small"])
def case(request, stack, tmp_path_factory) -> Case:
    """A run's commit and what it pushed and registered; its folder then holds no data any more.

    The last stage is one over all students, or, as in old runs, one of this student alone.
    """
    root, prefix = tmp_path_factory.mktemp("seen"), f"seen-{uuid.uuid4().hex[:10]}"
    curated = write_set(root / "data/curated")
    digest, drawn = ImageStream(curated, STREAM, 0).digest, {}
    for path, (steps, size, seed) in TRAININGS.items():
        stream = ImageStream(curated, STREAM, seed)
        drawn[path] = [stream.image(position).image_id for position in range(steps * size)]
    rows = read_manifest(curated / MANIFEST).to_pylist()
    reader = ShardReader(curated)
    images = {row["image_id"]: reader.read(row["shard"], row["offset"], row["length"]) for row in rows}
    write_weights(root, PRETRAINED, digest, init=None)
    write_weights(root, ADAPTED, digest)
    write_weights(root, STUDENT, digest, teacher_weights=ADAPTED)
    made = STUDENT if "@" in request.param else "models/students"
    outs = {path: push(root, path, prefix) for path in ("data/curated", ADAPTED, PRETRAINED, made)}
    stages = {
        "curate": {"outs": [outs["data/curated"]]},
        "pretrain": {"deps": [outs["data/curated"]], "outs": [outs[PRETRAINED]]},
        "adapt": {"deps": [outs["data/curated"], outs[PRETRAINED]], "outs": [outs[ADAPTED]]},
        request.param: {"deps": [outs["data/curated"], outs[ADAPTED]], "outs": [outs[made]]},
        "evaluate@small": {"deps": [{"path": STUDENT, "md5": folder_id(root / STUDENT)}]},
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    (root / ".dvc").mkdir()
    url = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{prefix}"
    (root / ".dvc/config").write_text(f"[core]\nremote = s\n['remote \"s\"']\nurl = {url}\n")
    git(root, "init", "-q")
    (root / "dvc.yaml").write_text("stages: {}\n")
    git(root, "add", "dvc.yaml", "dvc.lock", ".dvc/config")
    git(root, "commit", "-q", "-m", "A run")
    client, name = MlflowClient(), f"seen-{uuid.uuid4().hex[:10]}"
    client.create_registered_model(name)
    for tags in (collect_origin(root, STUDENT).tags(), collect_origin(root, STUDENT).tags() | {Tag.LOCK_SHA256: "0"}):
        client.create_model_version(name, "s3://elsewhere/m", tags=tags)
    clone = tmp_path_factory.mktemp("clone") / "clone"
    git(root, "clone", "-q", str(root), str(clone))
    return Case(clone, name, drawn, images)


def expected_steps(case: Case, path: str, image_id: str) -> list[int]:
    return [at // TRAININGS[path][1] + 1 for at, one in enumerate(case.drawn[path]) if one == image_id]


def test_steps_of_each_training_with_an_image(case: Case):
    history = read_history(f"{case.name}/1", case.root)
    told = [(training.weights, training.relation) for training in history.trainings]
    assert told == [(STUDENT, "itself"), (ADAPTED, "taught by"), (PRETRAINED, "started from")]
    assert history.unknown is None
    student, *_, pretraining = history.trainings
    image_id = case.drawn[PRETRAINED][0]  # of step 1, and of later ones: it has three epochs in sight
    assert len(expected_steps(case, PRETRAINED, image_id)) > 1
    assert steps_with(pretraining, image_id) == expected_steps(case, PRETRAINED, image_id)
    assert steps_with(pretraining, image_id, step=1) == [1]
    assert steps_with(student, "0" * 64) == []
    with pytest.raises(RecordError, match=r"no commit in .* has the dvc\.lock of its registration; fetch the branch"):
        read_history(f"{case.name}/2", case.root)


def test_command(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(case.root)

    def seen(*arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["seen", f"{case.name}/1", *arguments])
        assert done.exit_code == code, done.stderr
        return done

    image_id = case.drawn[STUDENT][9]  # of the second step
    file = tmp_path / "photo.jpg"
    file.write_bytes(case.images[image_id])
    told = json.loads(seen("--image", str(file), "--step", "1", "--json").stdout)
    assert (told["image_id"], told["unknown"]) == (image_id, None)
    found = [expected_steps(case, path, image_id) for path in TRAININGS]
    found[0] = [step for step in found[0] if step <= 1]
    assert [training["steps"] for training in told["trainings"]] == found
    assert told["seen"] == any(found)
    other = tmp_path / "other.jpg"
    other.write_bytes(case.images[image_id] + b" ")
    said = seen("--image", str(other)).stdout.splitlines()
    assert said[0] == f"image {hashlib.sha256(other.read_bytes()).hexdigest()}: not seen by {case.name}/1"
    assert said[1].endswith("its dvc.lock has no data/embeddings")  # so near copies were not looked for
    other.write_text("no image")
    assert "other.jpg: not an image that Pedigree can read" in seen("--image", str(other), code=2).stderr
    (case.root / "params.yaml").write_text(f"name: {case.name}\n")
    MlflowClient().set_registered_model_alias(case.name, "champion", "1")
    by_default = CliRunner().invoke(app, ["seen", "--image", str(file)])
    assert by_default.stdout.splitlines()[0] == f"image {image_id}: seen by {case.name}/1"
    lines = [f"{i}\t{n}\t{path}" for path, ids in case.drawn.items() for i, n in Counter(ids).items()]
    assert sorted(seen("--list").stdout.splitlines()) == sorted(lines)
    assert (
        seen("--step", "2").stdout.splitlines()[0]
        == f"{STUDENT} of {case.name}/1, by step 2 of 3: 16 images in 16 draws"
    )
    for wrong, message in [
        (("--step", "4"), "had 3 steps; give 0 to 3"),
        (("--image", "x"), "neither a file nor an id"),
    ]:
        refused = seen(*wrong, code=2)
        assert len(refused.stderr.splitlines()) == 1
        assert message in refused.stderr
