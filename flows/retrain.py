"""The main flow: from the pool to a registered candidate, by the stages of `dvc.yaml`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect import State, flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from components.core import stage_runs
from components.core.errors import defect, known
from components.core.layout import Layout
from components.core.locks import exclusive
from components.core.mlflow_client import TrackingError
from components.lineage.code import STAGE as CODE_STAGE
from components.lineage.ledger import Stage
from components.recipe import Recipe, load_recipe
from flows import interrupt, live, preflight, published, run_events
from flows.console import board
from flows.decisions import announce_candidate
from flows.failure import failed
from flows.git import WorkspaceError, push_runs
from flows.registered import exact, open_registry
from flows.run_log import log_file
from flows.sources import choose, source_names
from flows.stages import StageFailedError, run_stage
from flows.workspace import Workspace, close_branch, open_workspace

STAGES_SIDE_BY_SIDE = 2
MOST_TRIES = 5  # of a flow run, which restarts after a crash or a stop of its worker


@dataclass(frozen=True)
class RunResult:
    """Result of a run: its record, folder, and each stage's outcome (`unchanged`, `restored` or `ran`)."""

    run_id: str
    branch: str
    commit: str
    folder: Path
    outcomes: dict[str, str]
    mlflow_url: str | None

    @property
    def computed(self) -> list[str]:
        """Names of the stages that ran."""
        return [name for name, outcome in self.outcomes.items() if outcome == "ran"]


@flow(
    name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=STAGES_SIDE_BY_SIDE), persist_result=False,  # type: ignore[arg-type]
    on_completion=[live.end], on_failure=[live.end], on_cancellation=[live.end], on_crashed=[live.end],
)  # fmt: skip
def retrain(
    params: Recipe | None = None,
    sources: list[str] | None = None,
    recipe: str | None = None,
    overrides: list[str] | None = None,
) -> RunResult | State[Any]:
    """Curate the pool, train, distill, evaluate, and register a candidate, recomputing only what changed.

    Parameters, code and sources are read when the run starts working; a run that waits for another one of its model
    reads them afterwards.

    Args:
        params: all parameters of the run; None means `recipe` with `overrides`.
        sources: names of sources in the pool, or SOURCE/SNAPSHOT; None means all permanent sources (the sample only if
            there is no other), without those ingested for one run.
        recipe: a named recipe; None means `params.yaml` of the checkout.
        overrides: KEY=VALUE, such as distill.steps=50.
    """
    with interrupt.handled() as interrupted:
        try:
            return _retrain(Path.cwd(), lambda: params or load_recipe(Path.cwd(), recipe, overrides or []), sources)
        except KeyboardInterrupt:
            return interrupt.end(interrupted)
        except Exception as error:
            if interrupt.requested() and known(error):
                return interrupt.end(interrupted)
            return failed(error)


def _retrain(checkout: Path, read_recipe: Callable[[], Recipe], sources: list[str] | None) -> RunResult:
    logger = get_run_logger()
    for line in live.close_lost(checkout):
        logger.warning(line)
    live.begin(checkout)
    _check_tries()
    name = read_recipe().name
    with _one_run_a_model(checkout, name):
        registry = open_registry()
        recipe, used = read_recipe(), choose(checkout, sources)
        if recipe.name != name:
            changed = f"the model's name changed from {name} to {recipe.name} while this run waited"
            raise WorkspaceError(f"{changed}; run again")
        preflight.check(checkout, recipe, used)
        run_events.check_log()
        with open_workspace(checkout, exact(recipe, registry), used) as workspace:
            live.note(checkout, run=workspace.run_id, model=recipe.name)
            with log_file(checkout, workspace.run_id):
                _name_flow_run(workspace.run_id)
                names = ", ".join(source_names(used))
                logger.info("run %s on branch %s, sources: %s", workspace.run_id, workspace.branch, names)
                return _run(workspace, recipe)


def _check_tries() -> None:
    """Refuse to start a flow run that has crashed repeatedly.

    Raises:
        WorkspaceError: after `MOST_TRIES`.
    """
    if flow_run.run_count > MOST_TRIES:
        raise WorkspaceError(
            f"started {MOST_TRIES} times and never ended; see the logs of the tries, then start it by hand. "
            "What was finished is kept"
        )


def _name_flow_run(name: str) -> None:
    """Name the flow run in Prefect as in git, MLflow and DVC."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), name=name)


def _run(workspace: Workspace, recipe: Recipe) -> RunResult:
    """Run the stages, and record the end in MLflow, Prefect and the run's branch, also after an error."""
    parent = stage_runs.open_parent(workspace.run_id, recipe.name, recipe.model_dump(mode="json", by_alias=True))
    status, how = "FAILED", "Run failed: a defect, see its log"
    try:
        run_events.started(workspace, recipe)
        with board.working("data", "putting the pool in place"):
            workspace.ledger.bring_data()
            workspace.ledger.fetch_run_cache()
        outcomes = _run_stages(workspace, recipe)
        _ask_for_decisions(workspace)
        status, how = "FINISHED", "Run finished"
    except Exception as error:
        how = f"Run failed: {known(error) or defect(error, 'in its log')}"
        raise
    finally:
        if interrupt.requested():
            status, how = "KILLED", f"Run interrupted: {interrupt.current.reason}"
        commit = close_branch(workspace.root, how)
        push_runs(Path.cwd(), get_run_logger())
        _close(workspace, recipe.name, parent, status)
    url = stage_runs.run_url(parent)
    return RunResult(workspace.run_id, workspace.branch, commit, workspace.root, outcomes, url)


def _close(workspace: Workspace, name: str, parent: str | None, status: str) -> None:
    """Publish the end of the run. Unreachable services only cause warnings, because git and DVC have the record."""
    try:
        stage_runs.close_parent(parent, status)
        run_events.anchor(name)
        if status != "FINISHED":
            stage_runs.close_lost(workspace.run_id, name)  # killed stages
    except TrackingError as error:
        get_run_logger().warning("the end of the run is reported to MLflow later: %s", error)
        live.leave_open()
    try:
        published.create_artifacts(workspace, parent)
    except (HTTPError, TrackingError) as error:
        get_run_logger().warning("tables and pictures are not all in the pages of Prefect and MLflow: %s", error)


def _ask_for_decisions(workspace: Workspace) -> None:
    """Send each candidate's event to Prefect, which ignores those of versions that an earlier run registered."""
    result = Layout(workspace.root).result("register")
    registered = json.loads(result.read_text()) if result.exists() else {}
    try:
        for made in registered.values():
            announce_candidate(f"{made['name']}/{made['version']}", made["digest"])
    except HTTPError as error:
        get_run_logger().warning("Prefect was not told of the new candidates, so it asks nobody: %s", error)


def _run_stages(workspace: Workspace, recipe: Recipe) -> dict[str, str]:
    """Submit every stage of the DAG after its dependencies; a failure stops its dependents."""
    futures: dict[str, PrefectFuture[str]] = {}
    stages = workspace.ledger.stages()
    trainings = {name: (config.steps, config.batch_size) for name, config in recipe.trainings().items()}
    board.plan([stage.name for stage in stages if stage.name != CODE_STAGE], trainings)
    for stage in stages:
        futures[stage.name] = _submit(stage, workspace, futures)
    with interrupt.deferred():
        wait(list(futures.values()))
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            error = future.result(raise_on_failure=False)
            raise error if isinstance(error, Exception) else StageFailedError(future.state.message)
    return {name: future.result() for name, future in futures.items() if name != CODE_STAGE}


def _submit(stage: Stage, workspace: Workspace, futures: dict[str, PrefectFuture[str]]) -> PrefectFuture[str]:
    needed: list[Any] = [futures[name] for name in stage.needs]
    return run_stage.submit(stage, workspace, wait_for=needed)  # pyright: ignore[reportCallIssue]


@contextmanager
def _one_run_a_model(checkout: Path, name: str) -> Iterator[None]:
    """Hold the model's lock, so that a second run of the model waits; it is released when the process ends."""
    path = Layout(checkout).runs / f"{name}.running"
    logger = get_run_logger()

    def log_wait(holder: str) -> None:
        logger.info("waiting for another run of %s: %s", name, holder or "it has just started")

    with exclusive(path, log_wait):
        path.write_text(f"process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}, {flow_run.ui_url}")
        yield
