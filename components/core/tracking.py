"""What happened, told to MLflow: one run a stage, nested in its pipeline run; nothing at all where no server is named.

MLflow is imported on first use. Without `MLFLOW_TRACKING_URI` every call but `download_weights` does nothing, so that
`dvc repro` works with no server.
"""

from __future__ import annotations

import atexit
import getpass
import hashlib
import logging
import math
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.core.errors import known
from components.core.git import try_git
from components.core.layout import Layout
from components.core.metric_queue import MetricPoint, MetricQueue
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri, without_login
from components.core.references import ModelReference
from components.core.weights_cache import keep_weights

log = logging.getLogger(__name__)

PARENT_STAGE = "flow"  # value of the tag pedigree.stage on a pipeline run
WEIGHTS_SHA256_TAG = "pedigree.weights_sha256"  # on a model version: SHA-256 of its model.safetensors
_MAX_KEY, _MAX_VALUE, _MAX_DIGEST = 250, 6000, 36  # characters; MLflow refuses longer ones
_TRACEBACK_FILE = "traceback.txt"
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # and larger batches


@dataclass
class StageRun:
    """The MLflow run of one stage; `run_id` is None when tracking is off."""

    run_id: str | None
    client: Any = None
    result: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = MetricQueue(self._send, TrackingError)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Keep the stage's result; its numbers become metrics when the stage ends well."""
        self.result = result

    def _send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        with reported():
            for start in range(0, len(points), _MAX_METRICS):
                batch = points[start : start + _MAX_METRICS]
                metrics = [Metric(_key(p.name), p.value, p.milliseconds, p.step) for p in batch]
                self.client.log_batch(self.run_id, metrics=metrics)


_OPEN: list[StageRun | None] = []  # this process's run, innermost last; None inside of `untracked`


@contextmanager
def stage_run(stage: str, item: str | None, params: Mapping[str, Any], root: Path) -> Iterator[StageRun]:
    """Record one stage as an MLflow run nested in its pipeline run.

    `params` (the model's `name`, which is the experiment, and what the stage works with) is logged at the start; the
    numbers of `log_result` and the files of `root/reports/<stage>[/<item>]` at the end. An exception marks the run
    FAILED (an interrupt KILLED) and passes on; the traceback of a defect is kept as `traceback.txt`.

    Raises:
        TrackingError: MLflow does not answer at the start or the end.
    """
    if not enabled():
        yield StageRun(None)
        return
    run = _open_stage(stage, item, params, root)
    _OPEN.append(run)
    os.environ["MLFLOW_RUN_ID"] = str(run.run_id)  # so that the ranks a stage starts log to the same run
    try:
        yield run
        run.metrics.add(flatten_numbers(run.result), step=0)
        run.metrics.flush()
        reports = Layout(root).report(stage, item)
        with reported():
            if reports.is_dir():
                run.client.log_artifacts(run.run_id, str(reports))
            run.client.set_terminated(run.run_id, "FINISHED")
    except BaseException as error:
        if isinstance(error, Exception) and known(error) is None:
            _log_traceback(run, error)
        _close_failed(run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        _OPEN.remove(run)
        os.environ.pop("MLFLOW_RUN_ID", None)


def open_parent(run_id: str, name: str, params: Mapping[str, Any]) -> str | None:
    """Create (or take up again) the MLflow run of a whole pipeline run, and return its MLflow id.

    Args:
        run_id: the pipeline run, as in the branch `runs/<run_id>`.
        name: the model's name, which is the experiment.
        params: the whole recipe; only its top-level values are logged, sections by their stages.
    """
    if not enabled():
        return None
    with reported():
        client = checked_client()
        experiment = _experiment(client, name)
        found = _find_parent(client, experiment, run_id)
        if found:
            client.update_run(found, status="RUNNING")
            return found
        tags = {"pedigree.run": run_id, "pedigree.stage": PARENT_STAGE, "mlflow.user": user_name()}
        created = client.create_run(experiment, run_name=run_id, tags=tags).info.run_id
        _log_params(client, created, {key: value for key, value in params.items() if not isinstance(value, Mapping)})
        return created


def close_parent(mlflow_run_id: str | None, status: str) -> None:
    """End a pipeline run with FINISHED, FAILED or KILLED; None is a run that tracking never opened."""
    if mlflow_run_id is not None and enabled():
        with reported():
            checked_client().set_terminated(mlflow_run_id, status)


def close_lost(run_id: str, name: str) -> None:
    """End as KILLED what a pipeline run whose process is gone has left open: itself and its stages.

    Args:
        run_id: the pipeline run, as in the branch `runs/<run_id>`.
        name: the model's name, which is the experiment.
    """
    if not enabled():
        return
    with reported():
        client = checked_client()
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            opened = f"tags.`pedigree.run` = '{run_id}' AND attributes.status = 'RUNNING'"
            for run in client.search_runs([experiment.experiment_id], opened):
                client.set_terminated(run.info.run_id, "KILLED")


def log_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Queue metrics of a training step; costs microseconds, and nothing where no run is open."""
    try:
        if run := _active():
            run.metrics.add(flatten_numbers(metrics), step)
    except TrackingError as error:  # a rank's first word to a tracker that is away
        log.warning("metrics of step %d not logged: %s", step, error)


def tag_run(tags: Mapping[str, str]) -> None:
    """Set tags of the open run; a tracker that is away for a while stops nothing, and nothing is done without one."""
    try:
        if run := _active():
            with reported():
                for key, value in tags.items():
                    run.client.set_tag(run.run_id, _key(key), value[:_MAX_VALUE])
    except TrackingError as error:
        log.warning("run not tagged with %s: %s", ", ".join(tags), error)


def log_file(path: Path, folder: str) -> None:
    """Put a file among the open run's artifacts, below `folder`, at once; a tracker that is away stops nothing."""
    try:
        if run := _active():
            with reported():
                run.client.log_artifact(run.run_id, str(path), folder)
    except TrackingError as error:
        log.warning("%s not logged: %s", path.name, error)


@contextmanager
def untracked() -> Iterator[None]:
    """Report nothing inside: what is done there belongs to another run than the open one."""
    _OPEN.append(None)
    try:
        yield
    finally:
        _OPEN.pop()


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

    # A record only: building one of MLflow's dataset objects would load the data.
    dataset = Dataset(name=name, digest=digest, source_type="dvc", source=f'{{"uri": "{uri}"}}')
    labels = [InputTag("mlflow.data.context", context), *(InputTag(key, value) for key, value in tags.items())]
    with reported():
        run.client.log_inputs(run.run_id, datasets=[DatasetInput(dataset, labels)])


def download_weights(uri: str, root: Path = Path()) -> Path:
    """Fetch a registered model's weights: a folder with model.safetensors and config.json, checked by SHA-256.

    A version is fetched once and kept under `root/.pedigree/cache/models`; the kept files are hashed again at each use.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@alias`.
        root: the workspace.

    Raises:
        TrackingError: no server is set, it does not answer, the version does not exist, or its bytes are not what
            was registered.
    """
    asked = ModelReference.of_uri(uri)
    if asked is None:
        raise TrackingError(f"{uri}: not a registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if not server_uri():
        raise TrackingError(f"{uri}: MLFLOW_TRACKING_URI is not set; run 'pedigree up', or set it")
    with reported():
        client = checked_client()
        found = asked.find(client)
        # Two servers may both have a version 1 of the same name.
        origin = hashlib.sha256(f"{found.source} {found.creation_timestamp}".encode()).hexdigest()[:12]
        folder = Layout(root).cache("models") / f"{asked.name}-{found.version}-{origin}"
        model = ModelReference(asked.name, version=str(found.version)).uri

        def fetch(target: Path) -> Path:
            from mlflow.artifacts import download_artifacts

            return Path(download_artifacts(artifact_uri=model, dst_path=str(target), tracking_uri=server_uri()))

        try:
            keep_weights(folder, fetch, found.tags.get(WEIGHTS_SHA256_TAG))
        except TrackingError as error:
            raise TrackingError(f"{model}: {error}") from None
    return folder


def describe_run(mlflow_run_id: str | None, markdown: str) -> None:
    """Set the text on top of a run's page; None is a run that tracking never opened."""
    if mlflow_run_id is not None and enabled():
        with reported():
            checked_client().set_tag(mlflow_run_id, "mlflow.note.content", markdown)


def run_url(mlflow_run_id: str | None) -> str | None:
    """Address of a run's page; None when tracking is off or the store has no pages."""
    uri = server_uri()
    if mlflow_run_id is None or not uri or not uri.startswith("http"):
        return None
    with reported():
        experiment = checked_client().get_run(mlflow_run_id).info.experiment_id
    page = f"{without_login(uri).rstrip('/')}/#/experiments/{experiment}/runs/{mlflow_run_id}"
    return f"{page}?workflowType=machine_learning"  # else MLflow shows its menus for language models


def enabled() -> bool:
    """Whether this process reports: a server is named, and it is the first rank."""
    if os.environ.get("RANK", "0") != "0":
        return False
    if not server_uri():
        log.info("MLFLOW_TRACKING_URI is not set: this run is not tracked")
        return False
    return True


def user_name() -> str:
    """Who runs this process; a number where the system knows no name for it, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def flatten_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers of nested dicts under dotted names; everything else is left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _open_stage(stage: str, item: str | None, params: Mapping[str, Any], root: Path) -> StageRun:
    run_id, commit, dirty = _git(root)
    run_name = f"{run_id}/{stage}" + (f"@{item}" if item else "")
    tags = {"pedigree.item": item} if item else {}
    tags |= {
        "pedigree.stage": stage,
        "pedigree.run": run_id,
        "pedigree.commit": commit,
        "pedigree.dirty": str(dirty).lower(),
        "mlflow.source.git.commit": commit,
        "mlflow.user": user_name(),
    }
    with reported():
        client = checked_client()
        experiment = _experiment(client, params["name"])
        parent = _find_parent(client, experiment, run_id)
        if parent:
            tags["mlflow.parentRunId"] = parent
        same = f"attributes.run_name = '{run_name}' AND attributes.status = 'RUNNING'"
        for lost in client.search_runs([experiment], same):
            client.set_terminated(lost.info.run_id, "KILLED")  # its process died without a word
        created = client.create_run(experiment, run_name=run_name, tags=tags).info.run_id
        _log_params(client, created, params)
    return StageRun(created, client)


def _log_traceback(run: StageRun, error: Exception) -> None:
    try:
        with reported():
            run.client.log_text(run.run_id, "".join(traceback.format_exception(error)), _TRACEBACK_FILE)
        error.add_note(f"{_TRACEBACK_FILE} of MLflow's run {run_url(run.run_id) or run.run_id}")
    except TrackingError as refused:  # the defect matters more
        log.warning("traceback not logged to MLflow: %s", refused)


def where_logged(error: Exception) -> str:
    """Where the traceback of a defect is to be found, in words: the log, and MLflow if `stage_run` sent it there."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_TRACEBACK_FILE)]
    return " and ".join(["in the log", *notes])


def _close_failed(run: StageRun, status: str) -> None:
    try:
        run.metrics.flush()
        with reported():
            run.client.set_terminated(run.run_id, status)
    except TrackingError as error:  # the stage's own error matters more
        log.warning("run %s could not be marked %s: %s", run.run_id, status, error)


def _active() -> StageRun | None:
    inherited = os.environ.get("MLFLOW_RUN_ID")
    if not _OPEN and inherited and enabled():  # a rank that a stage started
        with reported():
            run = StageRun(inherited, checked_client())
        _OPEN.append(run)
        atexit.register(run.metrics.flush)
    return _OPEN[-1] if _OPEN else None


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:  # a stage beside this one was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _find_parent(client: Any, experiment: str, run_id: str) -> str | None:
    query = f"tags.`pedigree.run` = '{run_id}' AND tags.`pedigree.stage` = '{PARENT_STAGE}'"
    found = client.search_runs([experiment], query, max_results=1)
    return found[0].info.run_id if found else None


def _log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = [Param(_key(key), str(value)[:_MAX_VALUE]) for key, value in _flatten(params).items()]
    for start in range(0, len(flat), _MAX_PARAMS):
        client.log_batch(run_id, params=flat[start : start + _MAX_PARAMS])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)[:_MAX_KEY]


def _git(root: Path) -> tuple[str, str, bool]:
    """(pipeline run, commit, whether tracked files other than dvc.lock differ from it)."""
    commit = try_git(root, "rev-parse", "HEAD") or "none"
    branch = try_git(root, "symbolic-ref", "--short", "HEAD") or commit[:12]
    dirty = bool(try_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"))
    return branch.removeprefix("runs/"), commit, dirty
