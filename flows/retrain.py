"""The table of contents of the system: from the pool to a registered candidate, as `dvc.yaml` says."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import State, flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from components.core import tracking
from components.lineage.code import STAGE as CODE_STAGE
from components.lineage.ledger import Stage
from components.recipe import Recipe, load_recipe
from flows import published
from flows.stages import StageFailedError, run_stage
from flows.workspace import Workspace, WorkspaceError, chosen_sources, open_workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGES_SIDE_BY_SIDE = 2


@dataclass(frozen=True)
class RunResult:
    """What a run did: its record, its folder, and each stage's outcome (`unchanged`, `restored` or `ran`)."""

    run_id: str
    branch: str
    commit: str
    folder: Path
    outcomes: dict[str, str]
    mlflow_url: str | None

    @property
    def computed(self) -> list[str]:
        """Names of the stages that had to run."""
        return [name for name, outcome in self.outcomes.items() if outcome == "ran"]


@flow(name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=STAGES_SIDE_BY_SIDE), persist_result=False)  # type: ignore[arg-type]
def retrain(params: Recipe | None = None, sources: list[str] | None = None) -> RunResult | State[RunResult]:
    """Curate the pool, train, distill, evaluate, and register a candidate, recomputing only what changed.

    Args:
        params: all parameters of the run; None takes `params.yaml` of the checkout.
        sources: names of the sources in the pool to use; None takes all (the sample only if there is no other).
    """
    checkout = Path.cwd()
    logger = get_run_logger()
    try:
        recipe = params or load_recipe(checkout, None)
        used = chosen_sources(checkout, sources)
        with _one_run_a_model(checkout, recipe.name), open_workspace(checkout, _exact(recipe), used) as workspace:
            _name_flow_run(workspace.run_id)
            logger.info("run %s on branch %s, sources: %s", workspace.run_id, workspace.branch, ", ".join(used))
            return _run(workspace, recipe)
    except (ValueError, RuntimeError, OSError) as error:  # a person, the data or a service caused it: no traceback
        return Failed(message=str(error) or type(error).__name__)


def _name_flow_run(name: str) -> None:
    """Prefect's pages call the run what git, MLflow and DVC call it."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), name=name)


def _run(workspace: Workspace, recipe: Recipe) -> RunResult:
    parent = tracking.open_parent(workspace.run_id, recipe.name, recipe.model_dump(mode="json", by_alias=True))
    status = "FAILED"
    try:
        workspace.ledger.bring_data()
        workspace.ledger.fetch_run_cache()
        outcomes = _run_stages(workspace)
        status = "FINISHED"
    finally:
        tracking.close_parent(parent, status)
        published.publish(workspace, parent)
    commit = workspace.commit("Run finished")
    url = tracking.run_url(parent)
    return RunResult(workspace.run_id, workspace.branch, commit, workspace.root, outcomes, url)


def _run_stages(workspace: Workspace) -> dict[str, str]:
    """Submit every stage of the DAG to wait for those it needs; the first failure stops what comes after it."""
    futures: dict[str, PrefectFuture[str]] = {}
    for stage in workspace.ledger.stages():
        futures[stage.name] = _submit(stage, workspace, futures)
    wait(list(futures.values()))
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            error = future.result(raise_on_failure=False)
            raise error if isinstance(error, Exception) else StageFailedError(future.state.message)
    return {name: future.result() for name, future in futures.items() if name != CODE_STAGE}


def _submit(stage: Stage, workspace: Workspace, futures: dict[str, PrefectFuture[str]]) -> PrefectFuture[str]:
    needed: list[Any] = [futures[name] for name in stage.needs]
    return run_stage.submit(stage, workspace, wait_for=needed)  # pyright: ignore[reportCallIssue]


def _exact(recipe: Recipe) -> Recipe:
    """The recipe with today's champions written into it as exact versions, so that they are inputs like any other."""
    from components.registry.publish import one_line_errors, registry_client

    with one_line_errors():
        return _resolved(recipe, registry_client())


def _resolved(recipe: Recipe, client: MlflowClient) -> Recipe:
    from components.registry.promote import with_alias

    def version(name: str, alias: str) -> str | None:
        found = with_alias(client, name, alias)
        return f"models:/{name}/{found.version}" if found else None

    names = {model: recipe.name if model == "teacher" else f"{recipe.name}-{model}" for model in recipe.evaluate.models}
    champions = {model: found for model, name in names.items() if (found := version(name, "champion"))}
    if champions and not recipe.evaluate.champions:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"champions": champions})})
    teacher = Path(recipe.distill.teacher_weights)
    if teacher.is_absolute() and not teacher.is_dir():
        raise WorkspaceError(f"distill.teacher_weights: {teacher} is no folder; give one that holds weights")
    if named := re.fullmatch(r"models:/([^@/]+)@([^@/]+)", recipe.distill.teacher_weights):
        if (found := version(*named.groups())) is None:
            raise WorkspaceError(f"distill.teacher_weights: {named[0]} names no registered version")
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher_weights": found})})
    exact = {}
    for key in ("embedder", "semantic"):
        config: Any = getattr(recipe.embed, key)
        weights = getattr(config, "weights", "")  # which the kind `model` has
        if named := re.fullmatch(r"models:/([^@/]+)@([^@/]+)", weights):
            if (found := version(*named.groups())) is None:
                raise WorkspaceError(f"embed.{key}.weights: {weights} names no registered version")
            exact[key] = config.model_copy(update={"weights": found})
    if exact:
        recipe = recipe.model_copy(update={"embed": recipe.embed.model_copy(update=exact)})
    return recipe


@contextmanager
def _one_run_a_model(checkout: Path, name: str) -> Iterator[None]:
    """Hold the model's lock; a second run of the same model waits. The lock ends with the process, however it ends."""
    path = checkout / ".pedigree" / "runs" / f"{name}.running"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            get_run_logger().info("another run of %s goes on (process %s); waiting for it", name, lock.read().strip())
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
