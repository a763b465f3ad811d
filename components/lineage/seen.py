"""Recompute which images a registered model had seen by a step.

The order is a pure function of seed and data, so that `config.json` of the weights (seed, batch size, stream, the
manifest's SHA-256) and the curated set in the model's `dvc.lock` determine it. Both are read from the DVC remote,
independent of the present `data/curated`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.layout import RELATIVE
from components.core.references import ModelReference, is_registered
from components.data.config import StreamConfig
from components.data.stream import ImageStream
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record, RecordError, find_record, upstream
from components.lineage.provenance import CURATED, Tag
from components.lineage.streaming import stream_from
from components.lineage.trace import find_version

ANY_CACHE_GIB = 1e6  # no limit, since only blocks with the image are fetched


@dataclass(frozen=True)
class Training:
    """One training in a model's history.

    Attributes:
        version: registered version whose record contains it.
        weights: folder in that record.
        relation: to its successor: `itself`, `started from` or `taught by`.
        provenance: from `config.json` of the weights.
    """

    version: str
    weights: str
    relation: str
    provenance: dict[str, Any]
    record: Record

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.provenance["steps"]

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks."""
        return self.provenance["config"]["batch_size"]

    @contextmanager
    def stream(self) -> Iterator[ImageStream]:
        """Open its training stream, from the DVC remote.

        Raises:
            RecordError: the record's curated set differs from the one stated by the weights.
            StorageError: S3 does not answer, or the version was deleted.
        """
        config = StreamConfig(**self.provenance["config"]["stream"]).model_copy(update={"cache_gib": ANY_CACHE_GIB})
        with tempfile.TemporaryDirectory() as folder:
            stream_from(Remote(self.record.remote_url()), str(self.record.output(CURATED)), Path(folder))
            stream = ImageStream(Path(folder) / CURATED, config, self.provenance["seed"])
            if stream.digest != self.provenance["dataset_sha256"]:
                raise RecordError(
                    f"{self.weights} of {self.version}: trained on a manifest of SHA-256 "
                    f"{self.provenance['dataset_sha256']}, but {CURATED} of its dvc.lock has {stream.digest}"
                )
            yield stream


@dataclass(frozen=True)
class History:
    """Trainings of a model, its own first, each followed by that of its initial weights or teacher.

    Attributes:
        unknown: why the history ends, if the first weights have no record here.
    """

    trainings: list[Training]
    unknown: str | None = None


def find_record_of(reference: str, root: Path) -> tuple[str, Record]:
    """Return a registered version, as `NAME/3`, and the record of its run; raises as `read_history`."""
    version = find_version(reference, root)
    name = str(ModelReference.of_version(version))
    return name, _record(name, version.tags, root)


def read_history(reference: str, root: Path) -> History:
    """Find a registered model's trainings.

    Args:
        reference: `NAME@alias` or `NAME/number`.
        root: a clone of the repository with the model's commits.

    Raises:
        RecordError: no server, no such version, its record is missing here or contradicts the registration,
            or the DVC remote is not on S3.
        StorageError: the remote does not answer, or lacks the weights' config.json.
    """
    version = find_version(reference, root)
    name, path, relation = str(ModelReference.of_version(version)), version.tags.get(Tag.WEIGHTS_PATH, ""), "itself"
    record, trainings = _record(name, version.tags, root), []
    while True:
        training = Training(name, path, relation, _provenance(record, name, path), record)
        trainings.append(training)
        config = training.provenance["config"]
        if config.get("init"):
            return History(trainings, f"{path} began with weights from elsewhere: {config['init']['weights']}")
        if teacher := config.get("teacher_weights"):
            relation, parent = "taught by", teacher
        elif training.provenance["stage"] == "adapt":
            relation, parent = "started from", str(RELATIVE.weights("pretrained"))
        else:
            return History(trainings)
        if is_registered(parent):
            version = find_version(parent, root)
            name, path = str(ModelReference.of_version(version)), version.tags.get(Tag.WEIGHTS_PATH, "")
            record = _record(name, version.tags, root)
        elif record.output(parent) is None:
            return History(trainings, f"{path} was {relation} {parent}, which no stage of its dvc.lock makes")
        else:
            _check_read(record, path, parent)
            path = parent


def steps_with(training: Training, image_id: str, step: int | None = None) -> list[int]:
    """Return the steps, counted from 1, up to `step` (None: the last) in which a training drew an image, one per draw.

    Replacements of undecodable images are considered. Steps skipped for a non-finite loss count, because the image was
    processed.
    """
    with training.stream() as stream:
        positions = stream.seen(image_id, 0, (training.steps if step is None else step) * training.batch_size)
    return [position // training.batch_size + 1 for position in positions]


def draws_by(training: Training, step: int | None = None) -> dict[str, int]:
    """Count how often each image was drawn up to a step (None: the last), by id, assuming all images are decodable."""
    with training.stream() as stream:
        return stream.draws((training.steps if step is None else step) * training.batch_size)


def _record(name: str, tags: dict[str, str], root: Path) -> Record:
    record = find_record(root, tags.get(Tag.COMMIT, ""), tags.get(Tag.LOCK_SHA256))
    if record is None:
        branch = tags.get(Tag.BRANCH, "of its run")
        raise RecordError(
            f"{name}: no commit in {root} has the dvc.lock of its registration; fetch the branch {branch}"
        )
    if record.output(tags.get(Tag.WEIGHTS_PATH, "")) != tags.get(Tag.WEIGHTS_DVC):
        raise RecordError(f"{name}: its dvc.lock records other weights than the registered ones")
    return record


def _provenance(record: Record, name: str, path: str) -> dict[str, Any]:
    remote = Remote(record.remote_url())
    try:
        holder, inner = record.holder(path)
        found = json.loads(remote.read(remote.listing(str(holder))[f"{inner}config.json"]))["provenance"]
        return {key: found[key] for key in ("stage", "config", "seed", "dataset_sha256", "steps")}
    except (KeyError, ValueError):
        raise RecordError(f"{name}: {path}/config.json does not say what it was trained on") from None


def _check_read(record: Record, path: str, parent: str) -> None:
    """Raise RecordError unless the stage that produced `path` read the `parent` of the record."""
    stages = record.stages()
    deps = stages[upstream(stages, path)[0]].get("deps", [])
    if {"path": parent, "md5": record.output(parent)} not in [{k: dep.get(k) for k in ("path", "md5")} for dep in deps]:
        raise RecordError(f"{path} was not made from the {parent} that its dvc.lock holds")
