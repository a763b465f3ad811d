"""Send Prefect one event for each new snapshot of the pool, and find the retraining that it starts.

`.pedigree/unannounced/SOURCE/SNAPSHOT` holds the id of a snapshot's pending event. The file is written before `dvc add`
and moved to `.pedigree/announced` after Prefect has accepted the event; if an ingest fails in between, the next ingest
of the source sends it. The event keeps its id, and is sent only if Prefect does not have it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import httpx
import pyarrow.parquet as pq
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import Event, Resource
from prefect.events.filters import EventFilter, EventIDFilter
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from components.core.errors import ServiceError
from components.core.layout import RELATIVE
from components.core.storage import write_bytes
from components.data.manifest import MANIFEST
from flows.health import online_workers, start_worker

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

POOL_GROWN = "pedigree.pool.grown"  # triggers retraining, see prefect.yaml
LISTENER = "retrain/on-new-images"  # the triggered deployment
UNANNOUNCED, ANNOUNCED = RELATIVE.state / "unannounced", RELATIVE.state / "announced"
WAIT_SECONDS = 30.0  # for the triggered run: 1 to 2 s on an idle machine


@dataclass(frozen=True)
class Retraining:
    """Retraining started by a snapshot's event; `flow_run` and `url` are None if there is none."""

    snapshot: str
    images: int
    deployment: str = LISTENER
    flow_run: str | None = None
    url: str | None = None
    note: str | None = None  # problem and advice

    def __str__(self) -> str:
        if self.flow_run is None:
            return f"{self.images} new images announced, no retraining seen: {self.note}"
        started = f"{self.images} new images start a retraining: deployment {self.deployment}, {self.url}"
        return f"{started}; {self.note}" if self.note else started


def remember_untracked(source: Path) -> None:
    """Create a pending event for each snapshot of a pool's source that DVC does not track yet."""
    for folder in sorted(path for path in source.glob("[0-9a-f]*") if path.is_dir()):
        places = [home / source.name / folder.name for home in (UNANNOUNCED, ANNOUNCED)]
        if not any(place.exists() for place in (folder.with_name(f"{folder.name}.dvc"), *places)):
            write_bytes(places[0], str(uuid4()).encode())


def forget_snapshots(source: Path) -> None:
    """Drop the pending events of a source, so that no later ingest sends them."""
    for note in _notes(source):
        _settle(note)


def announce_snapshots(source: Path) -> list[Retraining]:
    """Send the pending events of a source, and return the retraining that each has started.

    Raises:
        ServiceError: Prefect does not answer or refused.
    """
    return [_announce_one(source / note.name, note) for note in _notes(source)]


def pending_snapshots(source: Path) -> list[Path]:
    """Return the existing snapshots of a source whose events are pending."""
    return [source / note.name for note in _notes(source)]


def _notes(source: Path) -> list[Path]:
    """Return the pending event files of the source's existing snapshots."""
    notes = sorted((UNANNOUNCED / source.name).glob("[0-9a-f]*"))
    return [note for note in notes if (source / note.name).is_dir()]


def _settle(note: Path) -> None:
    """Mark an event as sent."""
    settled = ANNOUNCED / note.relative_to(UNANNOUNCED)
    settled.parent.mkdir(parents=True, exist_ok=True)
    note.replace(settled)


def _announce_one(snapshot: Path, note: Path) -> Retraining:
    images = pq.read_metadata(snapshot / MANIFEST).num_rows
    event = Event(
        id=UUID(note.read_text()),
        event=POOL_GROWN,
        resource=Resource({"prefect.resource.id": f"pedigree.pool.{snapshot.parent.name}"}),
        payload={"images": images, "snapshot": snapshot.name},
    )
    result = Retraining(snapshot.name, images)
    try:
        with get_client(sync_client=True) as client:
            listener = _listener(client)
            before = {run.id for run in _started(client, listener)}
            if client.read_events(EventFilter(id=EventIDFilter(id=[event.id])), limit=1).events:
                _settle(note)
                return replace(
                    result, note=f"an ingest that was cut short had sent the event; see the runs of {LISTENER}"
                )
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
            _settle(note)
            return _found(client, listener, before, result)
    except httpx.HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" for url ")[0]
        if not note.exists():
            return replace(result, note=f"Prefect took the event but does not say what it started ({reason})")
        raise ServiceError(
            f"the images are stored, but Prefect did not take the event that starts a retraining ({reason}); "
            "ingest the source again to send it"
        ) from error


def _listener(client: SyncPrefectClient) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(LISTENER)
    except ObjectNotFound:
        return None


def _started(client: SyncPrefectClient, listener: DeploymentResponse | None) -> list[FlowRun]:
    """Return the newest runs that the deployment's trigger has created."""
    if listener is None:
        return []
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[listener.id]))
    runs = client.read_flow_runs(deployment_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=100)
    return [run for run in runs if run.created_by is not None and run.created_by.type == "AUTOMATION"]


def _found(
    client: SyncPrefectClient, listener: DeploymentResponse | None, before: set[UUID], result: Retraining
) -> Retraining:
    """Wait for the run that the event triggers."""
    if listener is None:
        return replace(result, note=f"Prefect has no deployment {LISTENER}; `prefect deploy --all` makes it")
    automations = client.read_resource_related_automations(f"prefect.deployment.{listener.id}")
    if not any(automation.enabled for automation in automations):
        return replace(
            result, note=f"the trigger of {LISTENER} is off; switch it on in Prefect's page, under Automations"
        )
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        if new := [run for run in _started(client, listener) if run.id not in before]:
            run = new[-1]
            where = url_for("flow-run", obj_id=run.id)
            return replace(result, flow_run=str(run.id), url=where, note=_missing_worker(client, listener))
        time.sleep(0.5)
    return replace(result, note=f"the trigger of {LISTENER} made no run in {WAIT_SECONDS:.0f} s; look at Prefect's log")


def _missing_worker(client: SyncPrefectClient, listener: DeploymentResponse) -> str | None:
    pool = listener.work_pool_name or ""
    return None if online_workers(client, pool) else f"it waits for a worker: {start_worker(pool)}"
