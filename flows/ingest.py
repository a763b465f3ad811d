"""Take a source into the pool, validate it, track it, and tell who waits for new images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Failed

from components.data.ingest import IngestReport
from components.data.ingest import ingest as ingest_source
from components.data.ingest_config import IngestRequest
from components.lineage.ledger import Ledger
from flows import interrupt, live
from flows.stages import RETRIES

POOL_GROWN = "pedigree.pool.grown"  # prefect.yaml starts retraining on it


@flow(
    name="ingest", persist_result=False,
    on_completion=[live.end], on_failure=[live.end], on_cancellation=[live.end], on_crashed=[live.end],
)  # fmt: skip
def ingest(request: IngestRequest, announce: bool = True) -> IngestReport | State[Any]:
    """Store what is new of a source, validated and tracked by DVC.

    Args:
        request: what to read, its name and its licence.
        announce: emit the event that starts retraining when images were added to the pool.
    """
    live.close_lost(Path.cwd())
    live.begin(Path.cwd())
    with interrupt.handled() as interrupted:
        try:
            report = ingest_source(request)
            track(request)
        except KeyboardInterrupt:
            return interrupt.final_state(interrupted)
        except (ValueError, RuntimeError, OSError) as error:  # a person, the data or a service caused it: no traceback
            return Failed(message=str(error) or type(error).__name__)
    create_markdown_artifact(f"**{request.name}**: {report}", key=f"ingest-{request.name}")
    if announce and report.pool_snapshot is not None:
        resource = {"prefect.resource.id": f"pedigree.pool.{request.name}"}
        emit_event(POOL_GROWN, resource=resource, payload={"images": report.stored})
    return report


@task(name="track", persist_result=False, cache_policy=NO_CACHE, **RETRIES)
def track(request: IngestRequest) -> list[str]:
    """`dvc add` and push every snapshot of the source, so that an ingest that was cut short is completed."""
    ledger = Ledger(Path.cwd())
    found = []
    for collection in (request.pool, request.evaluation):
        for folder in sorted(p for p in (collection / request.name).glob("[0-9a-f]*") if p.is_dir()):
            found.append(ledger.track(folder))
    return found
