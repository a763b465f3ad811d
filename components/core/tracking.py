"""Log metrics, tags, files and data inputs to the open MLflow run; no-op when MLFLOW_TRACKING_URI is unset.

`stage_runs` opens and closes runs. MLflow is imported on first use.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from components.core.metric_queue import MetricPoint, MetricQueue
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri

logger = logging.getLogger(__name__)

MAX_VALUE = 6000  # characters of a parameter or tag; MLflow refuses longer ones
_MAX_KEY, _MAX_DIGEST = 250, 36  # characters, likewise
_MAX_METRICS = 1000  # of one batch, likewise


@dataclass
class StageRun:
    """The MLflow run of one stage; `run_id` is None when tracking is off."""

    run_id: str | None
    client: Any = None
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.metrics = MetricQueue(self._send, TrackingError)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Store the stage's result; its numbers are logged as metrics when the stage succeeds."""
        self.result = result

    def _send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        with reported():
            for start in range(0, len(points), _MAX_METRICS):
                batch = points[start : start + _MAX_METRICS]
                metrics = [Metric(valid_key(p.name), p.value, p.milliseconds, p.step) for p in batch]
                self.client.log_batch(self.run_id, metrics=metrics)


open_runs: list[StageRun] = []  # of this process; the last one is active


def log_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Queue metrics of a training step, in microseconds; no-op without an open run."""
    try:
        if run := _active():
            run.metrics.add(flatten_numbers(metrics), step)
    except TrackingError as error:  # a rank's first call, to an unreachable tracker
        logger.warning("metrics of step %d not logged: %s", step, error)


def tag_run(tags: Mapping[str, str]) -> None:
    """Set tags of the open run; only warn if the tracker is unreachable; no-op without an open run."""
    try:
        if run := _active():
            with reported():
                for key, value in tags.items():
                    run.client.set_tag(run.run_id, valid_key(key), value[:MAX_VALUE])
    except TrackingError as error:
        logger.warning("run not tagged with %s: %s", ", ".join(tags), error)


def log_file(path: Path, folder: str) -> None:
    """Log a file as an artifact below `folder`, at once; only warn if the tracker is unreachable."""
    try:
        if run := _active():
            with reported():
                run.client.log_artifact(run.run_id, str(path), folder)
    except TrackingError as error:
        logger.warning("%s not logged: %s", path.name, error)


@contextmanager
def reporting_to(run: StageRun) -> Generator[None]:
    """Make `run` the active one of several open runs inside the block."""
    open_runs.append(run)
    try:
        yield
    finally:
        open_runs.pop()


def log_input(name: str, digest: str, uri: str, tags: Mapping[str, str], context: str) -> None:
    """Record a dataset that the open stage run reads.

    Args:
        name: the dataset, for example `data/curated`.
        digest: at most 36 characters: DVC's `<md5>.dir` fits. SHA-256 goes into `tags`.
        uri: where its bytes are.
        tags: for example `{"sha256": ...}`.
        context: what for: `training`, `evaluation`.
    """
    if len(digest) > _MAX_DIGEST:
        raise ValueError(
            f"dataset digest {digest!r}: longer than {_MAX_DIGEST} characters; give the DVC md5, not SHA-256"
        )
    run = _active()
    if run is None:
        return
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # Only the record: MLflow's dataset classes would load the data.
    dataset = Dataset(name=name, digest=digest, source_type="dvc", source=f'{{"uri": "{uri}"}}')
    labels = [InputTag("mlflow.data.context", context), *(InputTag(key, value) for key, value in tags.items())]
    with reported():
        run.client.log_inputs(run.run_id, datasets=[DatasetInput(dataset, labels)])


def enabled() -> bool:
    """Return whether this process logs to MLflow: a server is configured, and this is the first rank."""
    if os.environ.get("RANK", "0") != "0":
        return False
    if not server_uri():
        logger.info("MLFLOW_TRACKING_URI is not set: this run is not tracked")
        return False
    return True


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flatten_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the finite numbers of nested dicts into dotted keys; drop everything else."""
    flat = flatten(values)
    return {key: float(v) for key, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}


def valid_key(name: str) -> str:
    """Return the name with characters that MLflow refuses replaced, truncated to its maximum length."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:_MAX_KEY]


def _active() -> StageRun | None:
    inherited = os.environ.get("MLFLOW_RUN_ID")
    if not open_runs and inherited and enabled():  # this is a rank started by a stage
        with reported():
            run = StageRun(inherited, checked_client())
        open_runs.append(run)
        atexit.register(run.metrics.flush)
    return open_runs[-1] if open_runs and open_runs[-1].run_id else None
