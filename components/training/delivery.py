"""Turn a job into its outputs: start or resume the run, train, then write weights, provenance and report."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from components.core.distributed import barrier, rank
from components.core.git import try_git
from components.core.layout import TRAINING_CONFIG, Layout
from components.core.pictures import draw_pca
from components.core.storage import atomic_dir, sha256_dir, sha256_file, write_json
from components.core.tracking import log_file
from components.data.batch import TrainingBatches
from components.model.export import save_weights
from components.training.alerts import FILE as ALERTS
from components.training.alerts import read_alerts, report_alerts
from components.training.checkpoint import Checkpoints, agreed, only_trainer, run_key
from components.training.config import TrainingConfig
from components.training.knn_probe import KnnProbe, load_probe
from components.training.loop import Job, Run, train
from components.training.loss_table import LOSSES, read_rows
from components.training.monitors import Probes, report_rows
from components.training.networks import Network
from components.training.parallelize import gather
from components.training.pictures import (
    NUM_IMAGES,
    PROGRESS,
    draw_crops,
    patch_colors,
    sample_images,
    save_picture,
    show_progress,
)

logger = logging.getLogger(__name__)

CROPS, PCA = "crops.jpg", "pca.jpg"
REPORT = (LOSSES, CROPS, PCA)
WEIGHTS, DIGEST = "weights", "sha256.json"
RESULTS_TTL_SECONDS = 30 * 86_400.0  # since its last use


@dataclass(frozen=True)
class Delivery:
    """Output paths of a run, and its parent weights."""

    root: Path  # workspace
    weights: Path
    report: Path
    parents: Mapping[str, Path]  # initial or teacher weights: folder or file


@dataclass(frozen=True)
class Training:
    """Identity of a training, and the paths of its state.

    Attributes:
        provenance: written into its weights.
        key: of the run, a hash of everything that determines it.
        other_key: of the same run in the other precision, which another machine may have chosen.
    """

    root: Path
    name: str
    config: TrainingConfig
    provenance: dict[str, Any]
    key: str
    other_key: str

    @property
    def folder(self) -> Path:
        """Checkpoints and reports of the unfinished run."""
        return Layout(self.root).checkpoints(self.key)

    @property
    def results(self) -> Path:
        """Results of the finished run."""
        return Layout(self.root).trained / self.key

    @property
    def figures(self) -> dict[str, Any]:
        """Key, length and last monitor row of the finished run."""
        config, rows = self.config, read_rows(self.results / LOSSES)
        last = rows[-1] if rows else {}
        images = config.steps * config.batch_size
        return {"run_key": self.key, "steps": config.steps, "images_seen": images, "last": last}


def digests(parents: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of a run's parent weights by name."""
    return {name: sha256_dir(path) if path.is_dir() else sha256_file(path) for name, path in parents.items()}


def describe_training(job: Job, root: Path, parents: Mapping[str, str]) -> Training:
    """Compute the key and provenance of a job.

    Args:
        job: its networks may still be on the meta device.
        root: workspace.
        parents: result of `digests`.
    """
    config = job.config
    facts = {"seed": job.seed, "dataset_sha256": job.stream.digest}
    facts |= {f"{name}_sha256": digest for name, digest in parents.items()}
    other = config.model_copy(update={"precision": "float32" if config.bfloat16 else "bfloat16"})
    key = run_key(job.name, config, facts)
    known = {"stage": job.name, "config": config.model_dump(mode="json"), **facts, "run_key": key}
    return Training(root, job.name, config, known, key, run_key(job.name, other, facts))


def train_and_deliver(job: Job, delivery: Delivery) -> dict[str, Any]:
    """Train the job and write its outputs; return its figures.

    Before the first step the resolved configuration is written beside the checkpoints, which are deleted once the
    results are stored.
    """
    training = describe_training(job, delivery.root, digests(delivery.parents))
    with only_trainer(training.folder, training.name):
        if has_results(training):
            logger.info("%s: trained by an earlier try; its results are reused", training.name)
            report_results(training)
        else:
            started = StartedTraining(training, job)
            run = Run(job, started.step, started.checkpoints, started.probes)
            train(run)
            started.store_results()
        if rank() == 0:
            with atomic_dir(delivery.weights) as folder:
                copy_weights(training, folder)
            copy_report(training, delivery.report)
        figures = training.figures
        drop_checkpoints(training)
    return figures


class StartedTraining:
    """A started training; every rank must create one.

    Attributes:
        step: with initial values.
        checkpoints: of the run.
        probes: periodic measurements of the EMA.
    """

    def __init__(self, training: Training, job: Job) -> None:
        self.training, self.job = training, job
        self._images = sample_images(job.stream, job.config.crops.global_size)
        self.step = job.training_step()
        self._before = patch_colors(job.networks.ema, self._images)
        if rank() == 0:
            # The commit is not part of the shipped weights: equal inputs give equal bytes for any commit.
            started = {**training.provenance, "git_commit": try_git(training.root, "rev-parse", "HEAD")}
            write_json(training.folder / TRAINING_CONFIG, started)
            details = (training.name, job.config.steps, job.config.batch_size, training.folder / TRAINING_CONFIG)
            logger.info("%s: %d steps of %d images; all settings are in %s", *details)
            _draw_first_batch(job, training.folder / CROPS)
        self.probes = _probes(job, training, self._images)
        self.checkpoints = _checkpoints(training.root, training.key, job.config)
        if self.checkpoints.newest() is None:
            _warn_of_other_precision(training)

    def store_results(self) -> None:
        """Store the results; every rank must call."""
        config = self.job.config
        if shipped := gather(self.job.networks.ema):  # on the first rank
            steps, images_seen = config.steps, config.steps * config.batch_size
            seen = {"steps": steps, "images_seen": images_seen, "positions": [0, images_seen]}
            shown = {"before training": self._before, "after it": patch_colors(shipped, self._images)}
            _store_results(self.training, shipped, self.training.provenance | seen, draw_pca(self._images, shown))
        barrier()


def _checkpoints(root: Path, key: str, config: TrainingConfig) -> Checkpoints:
    uri = f"{config.checkpoint_uri.rstrip('/')}/{key}" if config.checkpoint_uri else None
    return Checkpoints(Layout(root).checkpoints(key), uri)


def _warn_of_other_precision(training: Training) -> None:
    """Warn of a run in the other precision, perhaps begun on another machine; every rank must call."""
    config = training.config
    steps = _checkpoints(training.root, training.other_key, config).newest()
    if steps is not None and rank() == 0:
        stage, other = training.name.partition("/")[0], "float32" if config.bfloat16 else "bfloat16"
        logger.warning(
            "%s: starts anew in %s, although step %d of %d is done in %s; to go on from there, stop it and set %s",
            *(training.name, config.precision, steps, config.steps, other, f"{stage}.precision={other}"),
        )


def _probes(job: Job, training: Training, images: NDArray[np.uint8]) -> Probes:
    average, pictures = job.networks.ema, job.config.monitor.pictures_every_steps
    labeled = _labeled(job.config, training.root)
    knn = partial(labeled.top1, average) if labeled else None
    return Probes(knn, partial(show_progress, average, images, training.folder) if pictures else None)


def _labeled(config: TrainingConfig, root: Path) -> KnnProbe | None:
    if config.monitor.knn is None:
        return None
    return load_probe(Layout(root).evaluation, config.monitor.knn, config.crops.global_size, bfloat16=config.bfloat16)


def forget(root: Path, key: str) -> None:
    """Delete the stored results of a run whose stage has completed; a later run trains again."""
    shutil.rmtree(Layout(root).trained / key, ignore_errors=True)


def _store_results(training: Training, shipped: Network, provenance: dict[str, Any], pca: Image) -> None:
    """Store the results, also for a retry of the stage if it fails later, for example to reach a service.

    DVC deletes a stage's outputs before it runs, so that without this copy a retry would train again.
    """
    folder = training.folder
    with atomic_dir(training.results) as staging:
        save_weights(staging / WEIGHTS, shipped.backbone, shipped.heads, provenance)
        save_picture(pca, staging / PCA)
        for path in (folder / LOSSES, folder / CROPS, *folder.glob(ALERTS), *folder.glob(PROGRESS)):
            shutil.copyfile(path, staging / path.name)
        write_json(staging / DIGEST, {WEIGHTS: sha256_dir(staging / WEIGHTS)})
    for old in training.results.parent.iterdir():
        with suppress(FileNotFoundError):  # deleted meanwhile by another process
            if time.time() - old.stat().st_mtime > RESULTS_TTL_SECONDS:
                shutil.rmtree(old)


def has_results(training: Training) -> bool:
    """Return whether the run's results are stored and undamaged; every rank must call."""
    found = False
    if rank() == 0 and (training.results / DIGEST).is_file():
        found = json.loads((training.results / DIGEST).read_text()) == {WEIGHTS: sha256_dir(training.results / WEIGHTS)}
        for used in (training.results, training.results / DIGEST):
            os.utime(used)
    return agreed(found)


def drop_checkpoints(training: Training) -> None:
    """Delete the checkpoints and the folder of a delivered training; every rank must call.

    Call this last: the folder contains the lock, for which another process may wait.
    """
    barrier()
    checkpoints = _checkpoints(training.root, training.key, training.config)
    if rank() == 0:
        checkpoints.remove()
    barrier()


def copy_weights(training: Training, folder: Path) -> None:
    """Copy the weights of a finished training into a folder."""
    shutil.copytree(training.results / WEIGHTS, folder, dirs_exist_ok=True)


def copy_report(training: Training, folder: Path) -> None:
    """Copy the report of a finished training into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in REPORT:
        shutil.copyfile(training.results / name, folder / name)


def log_report(training: Training) -> None:
    """Log the report of a finished training to the tracker."""
    for name in REPORT:
        log_file(training.results / name, "")


def report_results(training: Training) -> None:
    """Log a finished training to the tracker, as during its training."""
    if rank() == 0:
        report_rows(read_rows(training.results / LOSSES))
        report_alerts(read_alerts(training.results))
        for path in sorted(training.results.glob(PROGRESS)):
            log_file(path, "progress")


def _draw_first_batch(job: Job, path: Path) -> None:
    """Draw the training crops of the stream's first images, with masks sampled for this small batch."""
    plan = replace(job.batch_plan(), batch_size=min(NUM_IMAGES, len(job.stream)), rank=0, num_ranks=1)
    batch = TrainingBatches(job.stream, plan)[0]
    if isinstance(batch, Exception):
        raise batch
    save_picture(draw_crops(batch, plan.patch_size), path)
