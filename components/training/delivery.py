"""From a job to its outputs: take up or start the run, train, then write weights, provenance and report."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.distributed import all_reduce_sum, barrier, rank
from components.core.storage import atomic_dir, sha256_dir, sha256_file, write_json
from components.data.batch import TrainingBatches
from components.model.export import save_weights
from components.training.checkpoint import Checkpoints, only_trainer, run_key
from components.training.knn_probe import load_probe
from components.training.loop import Job, train
from components.training.loss_table import Row, read_rows
from components.training.monitors import Probes
from components.training.parallelize import gather, training_device
from components.training.pictures import (
    NUM_IMAGES,
    draw_crops,
    draw_pca,
    pca_colors,
    sample_images,
    save_picture,
    show_progress,
)

logger = logging.getLogger(__name__)

LOSSES, CROPS, PCA = "loss.csv", "crops.jpg", "pca.jpg"
WEIGHTS, DIGEST = "weights", "sha256.json"
TRAINED = Path(".pedigree/cache/trained")  # by run key: what was delivered and is not yet reported
NUM_KEPT = 3


@dataclass(frozen=True)
class Delivery:
    """Where a run's outputs go, and what it started from."""

    root: Path  # workspace
    weights: Path
    report: Path
    parents: dict[str, Path] = field(default_factory=dict)  # weights that it starts from or learns from: folder or file


def train_and_deliver(job: Job, delivery: Delivery) -> dict[str, Any]:
    """Train the job and write its outputs; return its figures.

    Before the first step the resolved configuration is logged and kept beside the checkpoints, which are deleted once
    the outputs stand.
    """
    facts = {
        "seed": job.seed,
        "dataset_sha256": job.stream.digest,
        **{f"{name}_sha256": _sha256(path) for name, path in delivery.parents.items()},
    }
    key = run_key(job.name, job.config, facts)
    folder = delivery.root / ".pedigree" / "checkpoints" / key
    kept = delivery.root / TRAINED / key
    provenance = {
        "stage": job.name,
        "config": job.config.model_dump(mode="json"),
        **facts,
        "run_key": key,
    }
    with only_trainer(folder):
        if _take_up(delivery, kept):
            logger.info("%s: trained by an earlier try, whose outputs are taken up", job.name)
            return _figures(job, key, read_rows(delivery.report / LOSSES))
        if rank() == 0:
            # The commit stays out of what ships: equal inputs give equal bytes, from whatever commit.
            begun = {**provenance, "git_commit": _git_commit(delivery.root)}
            write_json(folder / "config.json", begun)
            logger.info("%s: %s", job.name, json.dumps(begun, sort_keys=True))
        images = sample_images(job.stream, job.config.crops.global_size)
        before = pca_colors(job.networks.ema.backbone, images)
        _draw_first_batch(job, delivery.report)

        checkpoints = Checkpoints(folder, f"{uri.rstrip('/')}/{key}" if (uri := job.config.checkpoint_uri) else None)
        rows = train(job, checkpoints, _probes(job, delivery.root, folder, images))

        if shipped := gather(job.networks.ema):  # on the first rank
            steps, images_seen = job.config.steps, job.config.steps * job.config.batch_size
            provenance |= {"steps": steps, "images_seen": images_seen, "positions": [0, images_seen]}
            save_weights(delivery.weights, shipped.backbone, shipped.heads, provenance)
            after = pca_colors(shipped.backbone, images)
            save_picture(draw_pca(images, [before, after]), delivery.report / PCA)
            shutil.copyfile(folder / LOSSES, delivery.report / LOSSES)
            _keep(delivery, kept)
            checkpoints.remove()
        barrier()
    return _figures(job, key, rows)


def _probes(job: Job, root: Path, folder: Path, images: Tensor) -> Probes:
    config, average = job.config, job.networks.ema
    knn = picture = None
    if config.monitor.knn is not None:
        half = config.precision == "bfloat16"
        found = load_probe(root / "data" / "evaluation", config.monitor.knn, config.crops.global_size, half=half)
        knn = partial(found.top1, average) if found else None
    if config.monitor.pictures_every_steps is not None:
        picture = partial(show_progress, average, images, folder)
    return Probes(knn, picture)


def forget(root: Path, key: str) -> None:
    """Delete what is kept of a run whose stage has reported: whoever runs it again wants it trained again."""
    shutil.rmtree(root / TRAINED / key, ignore_errors=True)


def _keep(delivery: Delivery, kept: Path) -> None:
    """Keep a copy of what was delivered, for a stage that fails after training, when it reports to a service.

    Without it, trying again would train again: DVC clears a stage's outputs away before it runs.
    """
    with atomic_dir(kept) as aside:
        shutil.copytree(delivery.weights, aside / WEIGHTS)
        for name in (LOSSES, CROPS, PCA):
            shutil.copyfile(delivery.report / name, aside / name)
        write_json(aside / DIGEST, {WEIGHTS: sha256_dir(aside / WEIGHTS)})
    for old in sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-NUM_KEPT]:
        shutil.rmtree(old)


def _take_up(delivery: Delivery, kept: Path) -> bool:
    """Deliver what is kept of this very run; every rank must call. Returns whether anything, undamaged, was."""
    found = False
    if rank() == 0 and (kept / DIGEST).is_file():
        found = json.loads((kept / DIGEST).read_text()) == {WEIGHTS: sha256_dir(kept / WEIGHTS)}
    if found:
        with atomic_dir(delivery.weights) as folder:
            shutil.copytree(kept / WEIGHTS, folder, dirs_exist_ok=True)
        delivery.report.mkdir(parents=True, exist_ok=True)
        for name in (LOSSES, CROPS, PCA):
            shutil.copyfile(kept / name, delivery.report / name)
    return bool(all_reduce_sum(torch.tensor(float(found), device=training_device())))


def _sha256(path: Path) -> str:
    return sha256_dir(path) if path.is_dir() else sha256_file(path)


def _draw_first_batch(job: Job, report: Path) -> None:
    """Picture of the crops of the stream's first images, as they are trained on, and masks as drawn for so few."""
    if rank() == 0:
        plan = replace(job.batch_plan(), batch_size=min(NUM_IMAGES, len(job.stream)), rank=0, num_ranks=1)
        batch = TrainingBatches(job.stream, plan)[0]
        if isinstance(batch, Exception):
            raise batch
        save_picture(draw_crops(batch, plan.patch_size), report / CROPS)


def _figures(job: Job, key: str, rows: list[Row]) -> dict[str, Any]:
    """The run's key and length, and the last row that the monitor wrote."""
    config = job.config
    last = rows[-1] if rows else {}
    return {"run_key": key, "steps": config.steps, "images_seen": config.steps * config.batch_size, "last": last}


def _git_commit(root: Path) -> str | None:
    """Commit of the workspace; None outside of a git checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
