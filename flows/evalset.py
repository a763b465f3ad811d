"""Add an evaluation set: check it, put it in place, track it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.data import evalset_add
from components.data.evalset_add import Added
from components.data.evalset_config import EvalsetError, EvalsetRequest
from components.data.provenance import provenance_file
from components.lineage.ledger import Ledger
from flows import interrupt, live, run_events
from flows.console import board
from flows.failure import failed
from flows.pool_lock import pool_held
from flows.sources import EVALUATION, POOL, snapshots
from flows.stages import RETRIES


@flow(
    name="evalset", persist_result=False,
    on_completion=[live.end], on_failure=[live.end], on_cancellation=[live.end], on_crashed=[live.end],
)  # fmt: skip
def add_evalset(request: EvalsetRequest) -> Added | State[Any]:
    """Store an evaluation set, checked and tracked by DVC.

    Args:
        request: the folder, the set's name and its license; `replace` removes its other versions.
    """
    with interrupt.handled() as interrupted:
        try:
            live.close_lost(Path.cwd())
            live.begin(Path.cwd())
            return _add(request)
        except KeyboardInterrupt:
            return interrupt.end(interrupted)
        except Exception as error:
            return failed(error)


def _add(request: EvalsetRequest) -> Added:
    with pool_held(request.name, get_run_logger(), doing="adding the evaluation set"):
        known = [one for one in snapshots(Path.cwd()) if one.source == request.name]
        if any(one.collection == POOL for one in known):
            raise ConfigError(
                f"{request.name}: a source of the pool has this name, so a run would take the set as its held-out "
                "images; give another --name"
            )
        run_events.check_log()
        try:
            made = evalset_add.add_evalset(request)
        except (EvalsetError, DatasetError) as error:
            run_events.gate_failed(request, error)
            raise
        tracked = any(one.folder.name == made.version for one in known)
        track(made.snapshot)
        if made.new or not tracked:  # of an interrupted call, the set is there and not tracked
            told = request.model_copy(update={"license": made.config.license})
            run_events.ingested(told, made.ingested, pending=[])
        for one in known:
            if one.collection == EVALUATION and one.folder.name != made.version:
                Ledger(Path.cwd()).untrack(one.tracked_by)
                provenance_file(one.folder).unlink(missing_ok=True)
        for name in evalset_add.other_versions(made.snapshot):  # left by an interrupted call
            shutil.rmtree(made.snapshot.with_name(name), ignore_errors=True)
    return made


@task(name="track", persist_result=False, cache_policy=NO_CACHE, **RETRIES)
def track(snapshot: Path) -> str:
    """Track and push a set; return its DVC id."""
    with board.working(snapshot.parent.name, "tracking it with DVC, pushing it to S3"):
        return Ledger(Path.cwd()).track(snapshot)
