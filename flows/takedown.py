"""Withdraw images: the steps of a takedown in their order, each of which can be repeated."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components.core.mlflow_client import checked_client, server_uri
from components.lineage import takedown as steps
from components.lineage.audit_log import AuditLog
from components.lineage.lock_file import RecordError
from flows.announce import LISTENER
from flows.health import online_workers, start_worker
from flows.pool_lock import pool_held
from flows.purge import purge

if TYPE_CHECKING:
    from components.lineage.purge import Purged
    from components.lineage.takedown import Takedown

logger = logging.getLogger(__name__)


@dataclass
class Done:
    """What a takedown has done.

    Attributes:
        takedown: with the new snapshots.
        commit: of the checkout's branch.
        retraining: line on the retraining.
        notes: lines on what was not done.
        purged: None if no purge was asked for.
    """

    takedown: Takedown
    commit: str
    retraining: str
    notes: list[str] = field(default_factory=list)
    purged: Purged | None = None


def carry_out(root: Path, takedown: Takedown) -> Done:
    """Do all steps of a takedown, whose intent is saved; after a kill at any point, do them again.

    Args:
        root: the checkout, which is the current folder.
        takedown: the intent.

    Raises:
        RecordError, StorageError: the audit log does not take the event; nothing else is done then.
        PedigreeError: a step failed; the next call continues.
    """
    log = AuditLog.from_environment()
    with pool_held(takedown.id, logger, "the takedown"):
        # Those of an ingest that was at work when the takedown was asked for too.
        there = dict.fromkeys(steps.snapshots_with(root, takedown.images), "")
        takedown = takedown.model_copy(update={"snapshots": {**there, **takedown.snapshots}})
        held = {path: id_ for path, id_ in steps.dvc_ids(root).items() if path in takedown.snapshots}
        steps.record(takedown, log, held)
        steps.bury(root, takedown)
        takedown = steps.replace_snapshots(root, takedown)
        done = Done(takedown, steps.commit(root, takedown), "")
    done.notes += _flag(takedown, log)
    if takedown.purge:  # before a run begins, beside which nothing may be removed
        done.purged = purge(root, takedown, log)
    done.retraining = _retrain(takedown)
    takedown.forget(root)
    return done


def _flag(takedown: Takedown, log: AuditLog) -> list[str]:
    if not takedown.models:
        return []
    if not server_uri():
        raise RecordError("MLFLOW_TRACKING_URI is not set, and models are to be flagged: run `pedigree up`, then again")
    return steps.flag(takedown, checked_client(), log)


def _retrain(takedown: Takedown) -> str:
    """Start one retraining, however often it is asked for; return a line on it."""
    if not takedown.retrain:
        return "no retraining starts (--no-retrain); `pedigree run` trains on what is left"
    if not any(new for new in takedown.snapshots.values() if new):
        return "no retraining starts: no data version of the checkout has changed, or nothing is left to train on"
    if not os.environ.get("PREFECT_API_URL"):
        return "no retraining starts: PREFECT_API_URL is not set; `pedigree run` trains on what is left"
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.utilities.urls import url_for

    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(LISTENER)
            run = client.create_flow_run_from_deployment(deployment.id, idempotency_key=takedown.id)
            pool = deployment.work_pool_name or ""
            waits = "" if online_workers(client, pool) else f"; it waits for a worker: {start_worker(pool)}"
            return f"a retraining starts: deployment {LISTENER}, {url_for('flow-run', obj_id=run.id)}{waits}"
    except ObjectNotFound:
        return f"no retraining starts: Prefect has no deployment {LISTENER}; `prefect deploy --all` makes it"
    except HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"no retraining starts: Prefect does not answer ({reason}); start one by `pedigree run`"
