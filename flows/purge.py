"""Remove the bytes of withdrawn images everywhere, and prove it: DVC, S3, worktrees, caches, MLflow and Prefect."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from components.core.layout import Layout
from components.core.mlflow_client import checked_client, server_uri
from components.core.text import some_of
from components.lineage import purge as steps
from components.lineage.audit_chain import PURGE
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from components.lineage.ledger import Ledger
from components.lineage.purge import Doomed, Purged
from flows.failure import prefect_is_away
from flows.gc_lock import no_run_beside
from infra.local.compaction import compact_storage

if TYPE_CHECKING:
    from components.lineage.takedown import Takedown

ANY_GARBAGE = 1e-9  # share of a volume of the local S3 server from which its deleted bytes are overwritten
CHECKPOINT_TRIES = 60
BUSY_SECONDS = 60.0  # to wait for Prefect's server, which writes to the same database
MAX_ARTIFACTS = 200  # of one run
# Prefect's server keeps the data of an artifact also in the events of its making, change and deletion.
COLLECTION = "prefect.artifact-collection"
CHANGES = f"event IN ('{COLLECTION}.updated', '{COLLECTION}.deleted')"
WITH_PICTURE = f"event LIKE '{COLLECTION}.%' AND payload LIKE '%data:image/%'"
KEPT_EVENTS = "Prefect's server is not on this machine: its events keep pictures until it drops them (7 days)"
HISTORY = "git history was not rewritten: it has hashes, names of files in their sources, and the reason"


def purge(root: Path, takedown: Takedown, log: AuditLog) -> Purged:
    """Remove the bytes of a takedown's images and what shows them, then search all bytes for them.

    What is searched for is saved in the intent before anything is removed, so that a purge that was cut short proves as
    much when it is repeated.

    Args:
        root: the checkout.
        takedown: the intent.
        log: the audit log, which gets an event with what was removed and what is left.

    Raises:
        WorkspaceError: a run is in progress.
        StorageError, TrackingError: a service refuses, or does not answer; the next call continues.
    """
    with no_run_beside(root, "pedigree takedown"), Ledger(root).held():
        found = steps.find_doomed(root, takedown.images)
        search = {*map(bytes.fromhex, takedown.search), *found.needles}
        takedown.model_copy(update={"search": tuple(sorted(each.hex() for each in search))}).save(root)
        done = Purged(removed=steps.remove(root, found, takedown.images), lost=_lost(found))
        if server_uri():
            count, done.notes = steps.remove_mlflow_pictures(root, checked_client(), found.runs)
            done.removed["pictures in MLflow"] = count
        count, notes = remove_prefect_pictures(Layout(root).state / "prefect" / "prefect.db", found.runs)
        done.removed["pictures in Prefect"] = count
        done.notes += [*notes, HISTORY]
        compact_storage(root, ANY_GARBAGE)
        steps.prove(root, search, done)
    if found.unproved and not takedown.search:
        done.notes.append(f"the bytes of {len(found.unproved)} images were in no data version: nothing to search for")
    if found.unread:
        done.notes.append(f"{len(found.unread)} folders could not be read, such as {found.unread[0]}: not looked into")
    _record(takedown, found, done, log)
    return done


def _lost(found: Doomed) -> list[str]:
    lines = []
    if found.folders:
        named = [f"{id_[:12]} ({some_of(names)})" for id_, names in sorted(found.folders.items())]
        lines.append(f"{len(named)} data versions cannot be pulled whole: {some_of(named)}")
    if found.runs:
        lines.append(f"pictures, pages and embeddings of {len(found.runs)} runs: {some_of(found.runs)}")
    return lines


def _record(takedown: Takedown, found: Doomed, done: Purged, log: AuditLog) -> None:
    """Append the event of a purge, once for each time that it was carried out."""
    details = {
        "takedown": takedown.id,
        "reason": takedown.reason,
        "removed": dict(done.removed),
        "objects": sorted(found.objects),
        "data_versions": sorted(found.folders),
        "runs": found.runs,
        "searched": vars(done.searched),
        "left": done.left,
    }
    log.append(Event(PLATFORM, PURGE, takedown.id, takedown.by, details))


def remove_prefect_pictures(database: Path, runs: Sequence[str]) -> tuple[int, list[str]]:
    """Remove the pictures of runs from Prefect, and the events by which its server tells of all pictures.

    Args:
        database: of the local server, where there is one.
        runs: their ids.

    Returns:
        The number of pictures, and lines on what may be left.
    """
    told = _events(database, CHANGES)
    count, latest = _remove_artifacts(runs)
    if not database.exists():
        return count, [KEPT_EVENTS] if count else []
    until = time.monotonic() + BUSY_SECONDS
    while _events(database, CHANGES) < told + latest and time.monotonic() < until:  # the server writes events late
        time.sleep(0.5)
    return count, _shrink(database)


def _remove_artifacts(runs: Sequence[str]) -> tuple[int, int]:
    """Remove artifacts with pictures; return their number, and for how many of these the server sends an event."""
    if not os.environ.get("PREFECT_API_URL"):
        return 0, 0
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    count = told = 0
    try:
        with get_client(sync_client=True) as client:
            for run in runs:
                chosen = FlowRunFilter(name=FlowRunFilterName(any_=[run]))
                latest = {found.latest_id for found in client.read_latest_artifacts(flow_run_filter=chosen)}
                for artifact in client.read_artifacts(flow_run_filter=chosen, limit=MAX_ARTIFACTS):
                    if "data:image/" in str(artifact.data):
                        client.delete_artifact(artifact.id)
                        count += 1
                        told += artifact.id in latest
    except HTTPError as error:
        raise prefect_is_away(error) from error
    return count, told


def _events(database: Path, which: str) -> int:
    """Return how many events the server has written; 0 where the server is not on this machine."""
    if not database.exists():
        return 0
    with closing(sqlite3.connect(database, timeout=BUSY_SECONDS)) as connection:
        return connection.execute(f"SELECT count(*) FROM events WHERE {which}").fetchone()[0]


def _shrink(database: Path) -> list[str]:
    """Rewrite the local Prefect server's database without pictures; return a line if that failed."""
    why = "busy"
    try:
        with closing(sqlite3.connect(database, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute(f"DELETE FROM events WHERE {WITH_PICTURE}")
            connection.execute("VACUUM")
            for _ in range(CHECKPOINT_TRIES):  # refused while the server reads
                if not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    return []
                time.sleep(0.5)
    except sqlite3.Error as error:
        why = str(error)
    return [f"{database}: deleted pictures may still be in its free pages ({why}); run the takedown again"]
