"""From a job to its outputs: take up or start the run, train, then write weights, provenance and report."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from components.core.distributed import barrier, rank
from components.core.git import try_git
from components.core.layout import Layout
from components.core.storage import atomic_dir, sha256_dir, sha256_file, write_json
from components.core.tracking import log_file
from components.data.batch import TrainingBatches
from components.model.export import save_weights
from components.training.alerts import FILE as ALERTS
from components.training.alerts import read_alerts, report_alerts
from components.training.checkpoint import Checkpoints, agreed, only_trainer, run_key
from components.training.config import TrainingConfig
from components.training.knn_probe import KnnProbe, load_probe
from components.training.loop import Job, Trainee, train_together
from components.training.loss_table import LOSSES, Row, read_rows
from components.training.monitors import Probes, report_rows
from components.training.networks import Network
from components.training.parallelize import gather, place, training_device
from components.training.pictures import (
    NUM_IMAGES,
    PROGRESS,
    draw_crops,
    draw_pca,
    pca_colors,
    sample_images,
    save_picture,
    show_progress,
)
from components.training.run_folder import CONFIG

logger = logging.getLogger(__name__)

CROPS, PCA = "crops.jpg", "pca.jpg"
WEIGHTS, DIGEST = "weights", "sha256.json"
KEPT_SECONDS = 30 * 86_400.0  # a stage that has not taken it up by then never will


@dataclass(frozen=True)
class Delivery:
    """Where a run's outputs go, and what it started from."""

    root: Path  # workspace
    weights: Path
    report: Path
    parents: dict[str, Path] = field(default_factory=dict)  # weights that it starts from or learns from: folder or file


@dataclass(frozen=True)
class Beside:
    """A job that may be trained beside the wanted one; it is made only if its outputs are missing.

    It differs from the wanted one in its student alone, and starts from or learns from the same weights.
    """

    name: str
    config: TrainingConfig
    weights: Path  # where its own stage delivers
    make: Callable[[], Job]


@dataclass(frozen=True)
class _Run:
    """A training and its places."""

    root: Path
    provenance: dict[str, Any]
    weights: Path
    make: Callable[[], Job]
    other_key: str  # of the same run in the other precision, which another machine may have taken

    @property
    def name(self) -> str:
        return self.provenance["stage"]

    @property
    def key(self) -> str:
        return self.provenance["run_key"]

    @property
    def folder(self) -> Path:
        return Layout(self.root).checkpoints(self.key)

    @property
    def kept(self) -> Path:
        return Layout(self.root).trained / self.key

    def is_kept(self) -> bool:
        """Whether it is trained, and its stage has not taken it up; every rank must call."""
        return agreed((self.kept / DIGEST).is_file())

    def is_made(self) -> bool:
        """Whether it is kept, or delivered; every rank must call."""
        return self.is_kept() or agreed(_key_of(self.weights) == self.key)


def train_and_deliver(job: Job, delivery: Delivery, beside: Sequence[Beside] = ()) -> dict[str, Any]:
    """Train the job and write its outputs; return its figures.

    Those of the jobs `beside` it whose outputs are missing are trained with it, and kept until their own stage takes
    them up. Before the first step the resolved configuration is kept beside the checkpoints, which are
    deleted once what they led to is kept.
    """
    facts = {
        "seed": job.seed,
        "dataset_sha256": job.stream.digest,
        **{f"{name}_sha256": _sha256(path) for name, path in delivery.parents.items()},
    }

    def run(name: str, config: TrainingConfig, weights: Path, make: Callable[[], Job]) -> _Run:
        known = {"stage": name, "config": config.model_dump(mode="json"), **facts}
        other = config.model_copy(update={"precision": "float32" if config.half else "bfloat16"})
        keys = run_key(name, config, facts), run_key(name, other, facts)
        return _Run(delivery.root, {**known, "run_key": keys[0]}, weights, make, keys[1])

    wanted = run(job.name, job.config, delivery.weights, lambda: job)
    others = [] if wanted.is_kept() else [run(other.name, other.config, other.weights, other.make) for other in beside]
    with ExitStack() as locks:
        due = _hold(locks, wanted, others)
        if _take_up(wanted, delivery):
            logger.info("%s: trained by an earlier try or beside another run; taken up", job.name)
            left = _checkpoints(wanted.root, wanted.key, job.config)  # by a try that ended before it had deleted them
            if rank() == 0:
                left.remove()
            _report(wanted)
        else:
            _train([wanted, *due])
            _take_up(wanted, delivery)
        rows = read_rows(delivery.report / LOSSES)
    return _figures(job, wanted.key, rows)


def _hold(locks: ExitStack, wanted: _Run, others: Sequence[_Run]) -> list[_Run]:
    """Hold the wanted run and those of the others that must be trained, which are returned; waits for other processes.

    All processes ask for runs in the order of their keys, so that no two wait for each other.
    """
    due = []
    for run in sorted([wanted, *others], key=lambda run: run.key):
        if run is wanted:
            locks.enter_context(only_trainer(run.folder, run.name))
        elif not run.is_made():
            lock = locks.enter_context(ExitStack())
            lock.enter_context(only_trainer(run.folder, run.name))
            if run.is_made():  # by the process that was waited for
                lock.close()
            else:
                due.append(run)
    return due


def _train(runs: Sequence[_Run]) -> None:
    """Train runs together, the wanted one first; keep what is trained, and drop the checkpoints that led there."""
    jobs = [run.make() for run in runs]
    config, root = jobs[0].config, runs[0].root
    images = sample_images(jobs[0].stream, config.crops.global_size)
    for job in jobs:
        place(job.networks, job.config, training_device())
    before = [pca_colors(job.networks.ema, images) for job in jobs]
    labelled = _labelled(config, root)
    trainees = []
    for run, job in zip(runs, jobs, strict=True):
        if rank() == 0:
            # The commit stays out of what ships: equal inputs give equal bytes, from whatever commit.
            begun = {**run.provenance, "git_commit": try_git(root, "rev-parse", "HEAD")}
            write_json(run.folder / CONFIG, begun)
            told = (run.name, job.config.steps, job.config.batch_size, run.folder / CONFIG)
            logger.info("%s: %d steps of %d images; all settings are in %s", *told)
            _draw_first_batch(job, run.folder / CROPS)
        probes = _probes(job, labelled, run.folder, images)
        checkpoints = _checkpoints(root, run.key, config)
        if checkpoints.newest() is None:
            _tell_of_other_precision(run, config)
        trainees.append(Trainee(job, checkpoints, probes, tracked=run is runs[0]))

    found = train_together(trainees)
    for run, trainee, colors, rows in zip(runs, trainees, before, found, strict=True):
        if rows is None:  # it diverged, as its own stage will say
            continue
        if shipped := gather(trainee.job.networks.ema):  # on the first rank
            steps, images_seen = config.steps, config.steps * config.batch_size
            seen = {"steps": steps, "images_seen": images_seen, "positions": [0, images_seen]}
            shown = {"before training": colors, "after it": pca_colors(shipped, images)}
            _keep(run, shipped, run.provenance | seen, draw_pca(images, shown))
            trainee.checkpoints.remove()
    barrier()


def _checkpoints(root: Path, key: str, config: TrainingConfig) -> Checkpoints:
    uri = f"{config.checkpoint_uri.rstrip('/')}/{key}" if config.checkpoint_uri else None
    return Checkpoints(Layout(root).checkpoints(key), uri)


def _tell_of_other_precision(run: _Run, config: TrainingConfig) -> None:
    """Warn of a run that was begun in the other precision, on another machine perhaps; every rank must call."""
    steps = _checkpoints(run.root, run.other_key, config).newest()
    if steps is not None and rank() == 0:
        stage, other = run.name.partition("/")[0], "float32" if config.half else "bfloat16"
        logger.warning(
            "%s: starts anew in %s, although step %d of %d is done in %s; to go on from there, stop it and set %s",
            *(run.name, config.precision, steps, config.steps, other, f"{stage}.precision={other}"),
        )


def _labelled(config: TrainingConfig, root: Path) -> KnnProbe | None:
    if config.monitor.knn is None:
        return None
    return load_probe(Layout(root).evaluation, config.monitor.knn, config.crops.global_size, half=config.half)


def _probes(job: Job, labelled: KnnProbe | None, folder: Path, images: Tensor) -> Probes:
    average, pictures = job.networks.ema, job.config.monitor.pictures_every_steps
    knn = partial(labelled.top1, average) if labelled else None
    return Probes(knn, partial(show_progress, average, images, folder) if pictures else None)


def forget(root: Path, key: str) -> None:
    """Delete what is kept of a run whose stage has reported: whoever runs it again wants it trained again."""
    shutil.rmtree(Layout(root).trained / key, ignore_errors=True)


def _keep(run: _Run, shipped: Network, provenance: dict[str, Any], pca: Image) -> None:
    """Keep what was trained, for its own stage; also for one that fails afterwards, when it reports to a service.

    Without it, trying again would train again: DVC clears a stage's outputs away before it runs.
    """
    with atomic_dir(run.kept) as aside:
        save_weights(aside / WEIGHTS, shipped.backbone, shipped.heads, provenance)
        save_picture(pca, aside / PCA)
        for path in (run.folder / LOSSES, run.folder / CROPS, *run.folder.glob(ALERTS), *run.folder.glob(PROGRESS)):
            shutil.copyfile(path, aside / path.name)
        write_json(aside / DIGEST, {WEIGHTS: sha256_dir(aside / WEIGHTS)})
    for old in run.kept.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may forget it just now
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old)


def _take_up(run: _Run, delivery: Delivery) -> bool:
    """Deliver what is kept of the run; every rank must call. Returns whether anything, undamaged, was."""
    found = False
    if rank() == 0 and (run.kept / DIGEST).is_file():
        found = json.loads((run.kept / DIGEST).read_text()) == {WEIGHTS: sha256_dir(run.kept / WEIGHTS)}
    if found:
        with atomic_dir(delivery.weights) as folder:
            shutil.copytree(run.kept / WEIGHTS, folder, dirs_exist_ok=True)
        delivery.report.mkdir(parents=True, exist_ok=True)
        for name in (LOSSES, CROPS, PCA):
            shutil.copyfile(run.kept / name, delivery.report / name)
    return agreed(found)


def _report(run: _Run) -> None:
    """Tell the tracker of a run what it would have been told while it was trained."""
    if rank() == 0:
        report_rows(read_rows(run.kept / LOSSES))
        report_alerts(read_alerts(run.kept))
        for path in sorted(run.kept.glob(PROGRESS)):
            log_file(path, "progress")


def _key_of(weights: Path) -> str | None:
    """Run key of the weights in a folder, if there are any."""
    try:
        return json.loads((weights / "config.json").read_text())["provenance"]["run_key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    return sha256_dir(path) if path.is_dir() else sha256_file(path)


def _draw_first_batch(job: Job, path: Path) -> None:
    """Picture of the crops of the stream's first images, as they are trained on, and masks as drawn for so few."""
    plan = replace(job.batch_plan(), batch_size=min(NUM_IMAGES, len(job.stream)), rank=0, num_ranks=1)
    batch = TrainingBatches(job.stream, plan)[0]
    if isinstance(batch, Exception):
        raise batch
    save_picture(draw_crops(batch, plan.patch_size), path)


def _figures(job: Job, key: str, rows: list[Row]) -> dict[str, Any]:
    """The run's key and length, and the last row that the monitor wrote."""
    config = job.config
    last = rows[-1] if rows else {}
    return {"run_key": key, "steps": config.steps, "images_seen": config.steps * config.batch_size, "last": last}
