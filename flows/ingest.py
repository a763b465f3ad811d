"""Ingest a source into the pool, validate and track it, and announce new images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from components.core.errors import DatasetError
from components.data.ingest import IngestReport
from components.data.ingest import ingest as ingest_source
from components.data.ingest_config import IngestRequest
from components.lineage.ledger import Ledger
from flows import interrupt, live, run_events
from flows.announce import Retraining, announce_snapshots, forget_snapshots, pending_snapshots, remember_untracked
from flows.console import board
from flows.failure import failed
from flows.pool_lock import pool_held
from flows.stages import RETRIES


@dataclass(frozen=True)
class Ingested:
    """Report of an ingest, and the retraining that each new snapshot started."""

    report: IngestReport
    retraining: tuple[Retraining, ...]


@flow(
    name="ingest", persist_result=False,
    on_completion=[live.end], on_failure=[live.end], on_cancellation=[live.end], on_crashed=[live.end],
)  # fmt: skip
def ingest(request: IngestRequest, announce: bool = True) -> Ingested | State[Any]:
    """Store the new images of a source, validated and tracked by DVC.

    Args:
        request: what to read, its name and its license.
        announce: emit the event that starts retraining for images added to the pool, also by an earlier interrupted
            ingest of this source; if false, later ingests do not emit it for them either.
    """
    with interrupt.handled() as interrupted:
        try:
            live.close_lost(Path.cwd())
            live.begin(Path.cwd())
            return _ingest(request, announce)
        except KeyboardInterrupt:
            return interrupt.end(interrupted)
        except Exception as error:
            return failed(error)


def _ingest(request: IngestRequest, announce: bool) -> Ingested:
    source = request.pool / request.name
    with pool_held(request.name, get_run_logger()):
        run_events.check_log()
        try:
            report = ingest_source(request)
        except DatasetError as error:
            run_events.gate_failed(request, error)
            raise
        remember_untracked(source)
        track(request)
        run_events.ingested(request, report, pending_snapshots(source))
        retraining = announce_snapshots(source) if announce else []
        forget_snapshots(source)
    notes = "\n".join(("```text", *report.notes, "```"))  # names in it are no markup
    markdown = "\n\n".join(map(str, (f"**{request.name}**: {report}", notes, *retraining)))
    create_markdown_artifact(markdown, key=f"ingest-{request.name}")
    return Ingested(report, tuple(retraining))


@task(name="track", persist_result=False, cache_policy=NO_CACHE, **RETRIES)
def track(request: IngestRequest) -> list[str]:
    """Track and push every snapshot of the source, which also completes interrupted ingests."""
    ledger = Ledger(Path.cwd())
    found = []
    with board.working(request.name, "tracking it with DVC, pushing it to S3"):
        for collection in (request.pool, request.evaluation):
            for folder in sorted(p for p in (collection / request.name).glob("[0-9a-f]*") if p.is_dir()):
                found.append(ledger.track(folder))
    return found
