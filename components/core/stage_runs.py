"""Open and close the MLflow runs of stages and of pipeline runs; no-op when MLFLOW_TRACKING_URI is unset.

A stage's run is nested in its pipeline's run; `dvc repro` needs no server. MLflow is imported on first use.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.core.errors import known
from components.core.git import try_git
from components.core.layout import RELATIVE, Layout
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri, without_login
from components.core.tracking import MAX_VALUE, StageRun, enabled, flatten, flatten_numbers, open_runs, valid_key
from components.core.user import user_name

logger = logging.getLogger(__name__)

PARENT_STAGE = "flow"  # value of the tag pedigree.stage on a pipeline run
_TRACEBACK_FILE = "traceback.txt"
_MAX_PARAMS = 100  # of one batch; MLflow refuses larger ones


@contextmanager
def stage_run(stage: str, item: str | None, params: Mapping[str, Any], root: Path) -> Generator[StageRun]:
    """Record one stage as an MLflow run nested in its pipeline run.

    `params` (with the model's `name`, which is the experiment) are logged at the start; the numbers of `log_result` and
    the files of `root/reports/<stage>[/<item>]` at the end. An exception marks the run FAILED (an interrupt KILLED) and
    propagates; the traceback of a defect is logged as `traceback.txt`.

    Raises:
        TrackingError: MLflow does not answer at the start or the end.
    """
    if not enabled():
        yield StageRun(None)
        return
    run, outermost = _open_stage(stage, item, params, root), not open_runs
    open_runs.append(run)
    if outermost:
        os.environ["MLFLOW_RUN_ID"] = str(run.run_id)  # inherited by the stage's ranks, which log to the same run
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
        open_runs.remove(run)
        if outermost:
            os.environ.pop("MLFLOW_RUN_ID", None)


def open_parent(run_id: str, name: str, params: Mapping[str, Any]) -> str | None:
    """Create or reopen the MLflow run of a pipeline run, and return its MLflow id.

    Args:
        run_id: the pipeline run, as in the branch `runs/<run_id>`.
        name: the model's name, which is the experiment.
        params: the recipe; only top-level values are logged, since the stages log their own sections.
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
    """Set a pipeline run to FINISHED, FAILED or KILLED; no-op for None, a run that was never opened."""
    if mlflow_run_id is not None and enabled():
        with reported():
            checked_client().set_terminated(mlflow_run_id, status)


def close_lost(run_id: str, name: str) -> None:
    """Set the open MLflow runs of a dead pipeline run, its own and its stages', to KILLED.

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


def describe_run(mlflow_run_id: str | None, markdown: str) -> None:
    """Set the description on a run's page; no-op for None, a run that was never opened."""
    if mlflow_run_id is not None and enabled():
        with reported():
            checked_client().set_tag(mlflow_run_id, "mlflow.note.content", markdown)


def score_run(mlflow_run_id: str | None, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Set a pipeline run's metrics and tags, by which lists of runs are sorted; None is one that was never opened."""
    if mlflow_run_id is None or not enabled():
        return
    from mlflow.entities import Metric, RunTag

    with reported():
        client = checked_client()
        time = client.get_run(mlflow_run_id).info.start_time
        client.log_batch(
            mlflow_run_id,
            metrics=[Metric(valid_key(key), value, time, 0) for key, value in metrics.items()],
            tags=[RunTag(key, value[:MAX_VALUE]) for key, value in tags.items()],
        )


def run_url(mlflow_run_id: str | None) -> str | None:
    """Return the URL of a run's page; None when tracking is off or the store has no pages."""
    uri = server_uri()
    if mlflow_run_id is None or not uri or not uri.startswith("http"):
        return None
    with reported():
        experiment = checked_client().get_run(mlflow_run_id).info.experiment_id
    page = f"{without_login(uri).rstrip('/')}/#/experiments/{experiment}/runs/{mlflow_run_id}"
    return f"{page}?workflowType=machine_learning"  # else MLflow opens its interface for language models


def where_logged(error: Exception) -> str:
    """Describe where the traceback of a defect is: the log, and MLflow if `stage_run` logged it."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_TRACEBACK_FILE)]
    return " and ".join(["in the log", *notes])


def _open_stage(stage: str, item: str | None, params: Mapping[str, Any], root: Path) -> StageRun:
    run_id, commit, dirty = _git_facts(root)
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
            client.set_terminated(lost.info.run_id, "KILLED")  # its process died without closing it
        created = client.create_run(experiment, run_name=run_name, tags=tags).info.run_id
        _log_params(client, created, params)
    return StageRun(created, client)


def _log_traceback(run: StageRun, error: Exception) -> None:
    try:
        with reported():
            run.client.log_text(run.run_id, "".join(traceback.format_exception(error)), _TRACEBACK_FILE)
        error.add_note(f"{_TRACEBACK_FILE} of MLflow's run {run_url(run.run_id) or run.run_id}")
    except TrackingError as refused:  # the defect is the more important error
        logger.warning("traceback not logged to MLflow: %s", refused)


def _close_failed(run: StageRun, status: str) -> None:
    try:
        run.metrics.flush()
        with reported():
            run.client.set_terminated(run.run_id, status)
    except TrackingError as error:  # the stage's error is the more important one
        logger.warning("run %s could not be marked %s: %s", run.run_id, status, error)


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:  # a concurrent stage created it first
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

    flat = [Param(valid_key(key), str(value)[:MAX_VALUE]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), _MAX_PARAMS):
        client.log_batch(run_id, params=flat[start : start + _MAX_PARAMS])


def _git_facts(root: Path) -> tuple[str, str, bool]:
    """Return the pipeline run, the commit, and whether tracked files other than dvc.lock differ from it."""
    commit = try_git(root, "rev-parse", "HEAD") or "none"
    branch = try_git(root, "symbolic-ref", "--short", "HEAD") or commit[:12]
    dirty = bool(try_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RELATIVE.dvc_lock}"))
    return branch.removeprefix("runs/"), commit, dirty
