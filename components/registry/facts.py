"""What is recorded of a model when it is registered, in its folder `evaluation`, for the gates and the passport."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from components.core.config import Config, validate
from components.core.intervals import accuracy_interval, clustered_interval, difference_interval, is_accuracy
from components.core.metric_names import compared, deciding
from components.core.metrics import Interval, bootstrap_interval
from components.registry.config import GatesConfig

FOLDER = "evaluation"  # among the model's artifacts
FACTS, BY_IMAGE = "facts.json", "by_image.parquet"
RESAMPLES = 1000  # of measures other than accuracies
MAX_ROWS = 10_000_000  # of `by_image.parquet`; ImageNet's 50,000 test images, four models and five metrics are a tenth

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


class Facts(Config):
    """One registered model's record.

    Attributes:
        model: its name among the evaluations.
        gates: what it must hold.
        evaluation: the evaluation's result.json.
        champion: the version that it was evaluated beside, `models:/NAME/3`.
        scored_on: DVC ids of the evaluation collections that it was scored on.
        decontaminated_against: DVC ids of those whose copies curation left out.
        evaluation_copies: how many copies that were.
        snapshots: of the pool, that the model was made from.
        snapshots_passed: those that Great Expectations passed.
        authors: who started the run: git identity, and user names of the machine and of MLflow.
        size_mib: of the weights.
        latency_ms: of one image, the median.
        machine: on which that was measured.
    """

    model: str
    gates: GatesConfig
    evaluation: dict[str, JsonValue]
    champion: str | None
    scored_on: tuple[str, ...]
    decontaminated_against: tuple[str, ...]
    evaluation_copies: int
    snapshots: int
    snapshots_passed: int
    authors: tuple[str, ...]
    size_mib: float
    latency_ms: float
    machine: str

    def digest(self) -> str:
        """SHA-256 of all but the comparison with a champion, who ran it, and what depends on the machine.

        Weights with the same digest are the same candidate, whichever run made them.
        """
        evaluation = {k: v for k, v in self.evaluation.items() if k not in ("champion", "minus_champion")}
        values = self.model_dump(mode="json", exclude={"champion", "authors", "size_mib", "latency_ms", "machine"})
        canonical = json.dumps({**values, "evaluation": evaluation}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def metrics(self, model: str | None = None) -> dict[str, float]:
        """Its own metrics, or those of a model that it was evaluated beside, such as `random`."""
        values = self.evaluation if model is None else self.evaluation.get(model, {})
        assert isinstance(values, Mapping)
        return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}

    def main_metric(self) -> str:
        """The measure that decides."""
        return deciding(self.evaluation)

    def score(self) -> str:
        """The measure that decides with its value, as a tag."""
        return f"{self.main_metric()} {self.metrics()[self.main_metric()]:.4f}"

    def compared(self) -> list[str]:
        """Names of the models that it was evaluated beside, such as `random` or its teacher."""
        return compared(self.evaluation)

    def difference(self, other: str, metric: str) -> Interval | None:
        """What it is above a model that it was evaluated beside; None: not compared."""
        found: Any = self.evaluation.get(f"minus_{other}", {})
        return Interval(**found[metric]) if metric in found else None


def read_facts(folder: Path) -> Facts | None:
    """The record in a model's folder; None: it was registered before there were any.

    Raises:
        ConfigError: the file is not such a record.
    """
    path = folder / FACTS
    return validate(Facts, json.loads(path.read_text()), str(path)) if path.is_file() else None


def read_by_image(path: Path) -> pa.Table:
    """What models scored on each test image: columns image_id, model, metric, value, and cluster in newer ones.

    Raises:
        ValueError: it is no such table, or unpacks to more rows than an evaluation has.
    """
    file = pq.ParquetFile(path)
    if file.metadata.num_rows > MAX_ROWS:
        raise ValueError(f"{path.name} has {file.metadata.num_rows} rows, more than {MAX_ROWS}")
    return file.read(columns=["image_id", "model", "metric", "value", "cluster"])  # absent ones are left out


def metrics_in(by_image: pa.Table) -> list[str]:
    """Metrics that were measured image by image."""
    return pc.unique(by_image["metric"]).to_pylist()


def own_intervals(by_image: pa.Table) -> dict[str, Interval]:
    """What a model scored with its 95 % interval, by metric: Wilson's of accuracies, else the bootstrap's.

    Args:
        by_image: columns image_id, metric, value, and cluster if known; of one model.
    """
    return {metric: _own_interval(_of_metric(by_image, metric)) for metric in metrics_in(by_image)}


def _own_interval(rows: pa.Table) -> Interval:
    values, clusters, generator = rows["value"].to_numpy(), _clusters(rows), np.random.default_rng(0)
    if is_accuracy(values):
        return accuracy_interval(values, clusters)
    if clusters is not None:
        return clustered_interval(values, clusters, generator, RESAMPLES)
    return bootstrap_interval(values, generator, RESAMPLES)


def paired_differences(ours: pa.Table, theirs: pa.Table) -> dict[str, Interval] | None:
    """Ours minus theirs on the same test images, by metric that both have; None: the images are not the same.

    Args:
        ours: columns image_id, metric, value, and cluster if known.
        theirs: likewise.
    """
    found: dict[str, Interval] = {}
    for metric in metrics_in(ours):
        if metric not in metrics_in(theirs):
            continue
        one, other = (_of_metric(table, metric) for table in (ours, theirs))
        if not one["image_id"].equals(other["image_id"]):
            return None
        mine, others = one["value"].to_numpy(), other["value"].to_numpy()
        found[metric] = difference_interval(mine, others, np.random.default_rng(0), RESAMPLES, _clusters(one))
    return found


def _clusters(rows: pa.Table) -> NDArray[np.str_] | None:
    """Photograph of each image, where the evaluation set says which images are parts of one."""
    if "cluster" not in rows.column_names or rows["cluster"].null_count:
        return None
    return rows["cluster"].to_numpy().astype(str)


def _of_metric(table: pa.Table, metric: str) -> pa.Table:
    return table.filter(pc.equal(table["metric"], metric)).sort_by("image_id").combine_chunks()
