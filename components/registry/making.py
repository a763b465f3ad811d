"""How a model was made: recorded with it when it is registered, for its card and its passport."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pydantic import Field

from components.core.config import Config, validate
from components.core.layout import RELATIVE, Layout
from components.core.storage import sha256_file
from components.core.tracking import flatten
from components.lineage.code import STAGE as CODE_STAGE
from components.lineage.lock_file import Record, upstream
from components.lineage.provenance import CURATED, Origin
from components.model.config import Preprocessing, ViTConfig
from components.training.loss_table import LOSSES, read_rows

MAKING = "making.json"  # in the folder of the facts
DISTILL, TEACHER = "distill", str(RELATIVE.weights("adapted"))
CURVE_POINTS = 200  # at most
COSTS = ("hours", "gpu_hours", "energy_kwh", "co2e_kg")  # of a training, so far, in its last row


class Training(Config):
    """One training on the way to a model; costs are None where they are not known."""

    stage: str
    steps: int
    images_seen: int
    loss: float | None  # in the end
    hours: float | None
    gpu_hours: float | None
    energy_kwh: float | None
    co2e_kg: float | None
    curve: tuple[tuple[int, float], ...]  # step, loss


class Curation(Config):
    """What curation made of the pool; empty where its report is not in the workspace."""

    funnel: tuple[tuple[str, int], ...] = ()  # images left after each step
    origins: dict[str, int] = Field(default_factory=dict)  # images by the part that took them
    rejected: dict[str, int] = Field(default_factory=dict)  # images by reason


class Making(Config):
    """How a model was made.

    Attributes:
        origin: where the weights come from.
        run: the pipeline run.
        parent: the weights that training started from or was taught by, and their SHA-256.
        backbone: the `backbone` section of the weights' config.json.
        preprocessing: of the images, as evaluated.
        seed: of the run.
        trainings: first to last.
        curation: of the images.
        sources: source, license and number of images of the training set.
        shards: SHA-256 of its shards by name; empty where they were streamed, or not recorded.
    """

    origin: Origin
    run: str
    parent: tuple[str, str]
    backbone: dict[str, Any]
    preprocessing: Preprocessing
    seed: int
    trainings: tuple[Training, ...]
    curation: Curation
    sources: tuple[tuple[str, str, int], ...]
    shards: dict[str, str] = Field(default_factory=dict)

    @property
    def feature_dim(self) -> int:
        """Length of a feature."""
        return self.preprocessing.feature_dim(ViTConfig.model_validate(self.backbone))

    @property
    def num_images(self) -> int:
        """Images of the training set."""
        return sum(images for _, _, images in self.sources)

    @property
    def steps(self) -> str:
        """Such as `pretrain 800, adapt 80`."""
        return ", ".join(f"{training.stage} {training.steps:,}" for training in self.trainings)


def read_making(folder: Path) -> Making | None:
    """The record in a model's folder; None: it was registered before there were any.

    Raises:
        ConfigError: the file is not such a record.
    """
    path = folder / MAKING
    return validate(Making, json.loads(path.read_text()), str(path)) if path.is_file() else None


def given_parameters(record: Record) -> dict[str, Any]:
    """Sections of the run's `params.yaml`; empty where it has none."""
    return yaml.safe_load(record.read(str(RELATIVE.params)) or b"") or {}


def stages_of(record: Record, weights: str) -> list[str]:
    """Names of the stages that led to weights, trainings in their order."""
    stages, teacher = record.stages(), given_parameters(record).get(DISTILL, {}).get("teacher_weights", TEACHER)
    names = upstream(stages, weights)
    if DISTILL in names and teacher != TEACHER:  # a student of another teacher than this run's
        names = [DISTILL, *upstream(stages, CURATED)]
    return [name for name in reversed(names) if name != CODE_STAGE]


def parameters(record: Record, weights: str) -> dict[str, Any]:
    """Parameters of the stages that led to weights, as they were given, under dotted names; numbers of steps first.

    Args:
        record: of the run.
        weights: their folder; of a student only its own parameters count, not those of the others.
    """
    wanted = {"seed", *stages_of(record, weights)}
    flat = flatten({key: value for key, value in given_parameters(record).items() if key in wanted})
    students = f"{DISTILL}.students."
    mine = f"{students}{Path(weights).name}."
    own = {key: value for key, value in flat.items() if not key.startswith(students) or key.startswith(mine)}
    return dict(sorted(own.items(), key=lambda item: not item[0].endswith(".steps")))


def read_trainings(root: Path, weights: str) -> tuple[Training, ...]:
    """The trainings that led to weights and whose reports are in the workspace."""
    layout, found = Layout(root), []
    for stage in stages_of(Record(root), weights):
        student = Path(weights).name if stage == DISTILL else None
        report = layout.report(stage, "students") / student if student else layout.report(stage)
        rows = read_rows(report / LOSSES)
        if not rows or not layout.result(stage).is_file():
            continue
        figures: Mapping[str, Any] = json.loads(layout.result(stage).read_text())
        figures = figures[student] if student else figures
        curve = [(int(row["step"] or 0), loss) for row in rows if (loss := row["loss_total"]) is not None]
        shown = np.unique(np.linspace(0, len(curve) - 1, min(CURVE_POINTS, len(curve))).astype(int))
        found.append(
            Training(
                stage=stage,
                steps=figures["steps"],
                images_seen=figures["images_seen"],
                loss=rows[-1]["loss_total"],
                curve=tuple(curve[point] for point in shown),
                **{key: rows[-1].get(key) for key in COSTS},
            )
        )
    return tuple(found)


def read_curation(root: Path) -> Curation:
    """What the report of curation says."""
    path = Layout(root).result("curate")
    if not path.is_file():
        return Curation()
    result = json.loads(path.read_text())
    with path.with_name("funnel.csv").open(newline="") as file:
        funnel = tuple((row["stage"], int(row["images"])) for row in csv.DictReader(file))
    return Curation(funnel=funnel, origins=result["origins"], rejected=result["rejected"])


def sources(manifest: pa.Table) -> tuple[tuple[str, str, int], ...]:
    """(source, license, number of images), by source."""
    counts = manifest.group_by(["source", "license"]).aggregate([("image_id", "count")]).to_pylist()
    return tuple(sorted((row["source"], row["license"], row["image_id_count"]) for row in counts))


def read_shards(folder: Path, manifest: pa.Table) -> dict[str, str]:
    """SHA-256 of the shards of a manifest by name; of a streamed set, whose shards are not in the folder, none."""
    names = sorted(set(manifest["shard"].to_pylist()))
    if not all((folder / name).is_file() for name in names):
        return {}
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))
