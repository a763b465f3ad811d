"""A small curated set of a real photograph, and a small pretraining job with its networks in one's hands."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from skimage import data

from components.core.config import validate
from components.data.manifest import CURATED_SCHEMA, MANIFEST, POOL_SCHEMA, write_manifest
from components.data.shards import ShardWriter
from components.data.stream import ImageStream
from components.model.export import open_heads, save_weights
from components.model.head import ProjectionHead
from components.pretraining.config import PretrainConfig
from components.training.checkpoint import Checkpoints
from components.training.initial import draw_network
from components.training.loop import Job, Run, train
from components.training.loss_table import Row
from components.training.networks import self_distillation
from components.training.step import TrainingStep

TILE = 64


def load_heads(folder: Path) -> dict[str, ProjectionHead]:
    """Read the projection heads of a weights folder by name, on CPU."""
    heads, tensors = open_heads(folder)
    torch.nn.ModuleDict(heads).to_empty(device="cpu").load_state_dict(tensors)
    return heads


def write_curated(folder: Path) -> None:
    """Write 48 tiles of a photograph in several shards, as curation does."""
    facts = {"origin": "balanced", "group_id": ""}
    _write_tiles(folder, CURATED_SCHEMA, lambda _: facts)


def write_labeled(folder: Path) -> None:
    """Write the same tiles as an evaluation set of data/evaluation, each with its column of the photograph as class."""
    snapshot = folder / "astronaut" / "0123456789ab"
    _write_tiles(snapshot, POOL_SCHEMA, lambda box: {"label": f"column {box[0] // 128}"})


def _write_tiles(folder: Path, schema: pa.Schema, facts: Callable[[tuple[int, int, int, int]], dict[str, Any]]) -> None:
    photo = Image.fromarray(data.astronaut())
    boxes = [(x, y, x + TILE, y + TILE) for y in range(0, 384, TILE) for x in range(0, 512, TILE)]
    images = {}
    for box in boxes:
        file = io.BytesIO()
        photo.crop(box).save(file, "JPEG", quality=90)
        images[hashlib.sha256(file.getvalue()).hexdigest()] = file.getvalue(), box
    rows = []
    folder.mkdir(parents=True)
    with ShardWriter(folder, 40_000) as writer:
        for image_id, (encoded, box) in sorted(images.items()):
            shard, offset, length = writer.add(image_id, "jpg", encoded)
            rows.append({"image_id": image_id, "shard": shard, "offset": offset, "length": length, **facts(box)})
    known: dict[str, Any] = {
        "format": "JPEG", "width": TILE, "height": TILE, "source": "astronaut", "source_uri": "skimage",
        "license": "public domain",
    }  # fmt: skip
    empty = dict.fromkeys(schema.names)
    write_manifest(pa.Table.from_pylist([{**empty, **known, **row} for row in rows], schema), folder / MANIFEST)


def make_job(values: dict[str, Any], curated: Path) -> Job:
    """The job of pretraining with these values on `curated`, at its start."""
    config = validate(PretrainConfig, values, "test")
    shape = config.backbone.trained_at(config.crops.global_size)
    student = draw_network(shape, {"dino": config.dino_head, "ibot": config.ibot_head}, seed=0)
    stream = ImageStream(curated, config.stream, seed=0)
    networks = self_distillation(student, with_gram_teacher=config.gram is not None)
    return Job("pretrain", config, networks, stream, config.masking, seed=0)


def write_teacher(values: dict[str, Any], curated: Path, folder: Path) -> None:
    """Write the weights with which such a job begins, for students to learn from."""
    job = make_job(values, curated)
    job.training_step()
    save_weights(folder, job.networks.student.backbone, job.networks.student.heads, {})


def train_job(job: Job, checkpoints: Checkpoints, training: TrainingStep | None = None) -> list[Row]:
    """Train a job, as it is prepared or as it begins, from its newest checkpoint; return the monitor's rows."""
    run = Run(job, training or job.training_step(), checkpoints)
    train(run)
    return run.rows


def at_call(job: Job, number: int, action: Callable[[], None]) -> None:
    """Do something before the student's call `number`, from 0: one a step, or as many as gradient accumulation has."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(None)
        if len(calls) == number + 1:
            action()

    job.networks.student.register_forward_pre_hook(hook)


def break_call(job: Job, number: int) -> None:
    """Let what the student's class-token head gives be NaN in the student's call `number`."""
    broken: list[None] = []

    def hook(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor | None:
        return logits * float("nan") if broken else None

    job.networks.student.dino_head.register_forward_hook(hook)
    at_call(job, number, lambda: broken.append(None))
    at_call(job, number + 1, broken.clear)


def broken() -> dict[str, Any]:
    """A stage with a defect."""
    return {"loss": torch.ones(3) + torch.ones(4)}
