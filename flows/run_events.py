"""Events of runs and ingests in the audit log, and the anchors of the log that a run's closing commit carries.

Without PEDIGREE_AUDIT_BUCKET nothing is recorded, which one warning says. Else no run or ingest starts while the log
takes no events.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.core.errors import PedigreeError
from components.core.git import git, person
from components.core.layout import RELATIVE
from components.core.mlflow_client import checked_client
from components.core.tracking import enabled
from components.core.user import user_name
from components.data.expectations import FAILED, VALIDATION
from components.lineage.audit_anchors import TRAILER, anchor_experiment, anchor_text
from components.lineage.audit_log import PLATFORM, Event, open_log
from components.lineage.lock_file import Record

if TYPE_CHECKING:
    from components.data.evalset_config import EvalsetRequest
    from components.data.ingest import IngestReport
    from components.data.ingest_config import IngestRequest
    from components.recipe import Recipe
    from flows.workspace import Workspace

STARTED, ENDED, INGESTED, GATE = "run-started", "run-ended", "ingest", "gate"
CURATE = "curate"  # the stage with gates

logger = logging.getLogger(__name__)


def check_log() -> None:
    """Refuse to go on while the audit log takes no events.

    Raises:
        StorageError: it does not answer.
        RecordError, AuditKeyError: it is broken, or there is no key to sign with.
    """
    if log := open_log():
        log.check(PLATFORM)


def started(workspace: Workspace, recipe: Recipe) -> None:
    """Record that a run has started, with its commit and the snapshots of its pool; raises what `check_log` does."""
    record = Record(workspace.root)
    data = {**record.tracked(str(RELATIVE.pool)), **record.tracked(str(RELATIVE.evaluation))}
    _append(STARTED, workspace.run_id, {"model": recipe.name, "commit": _head(workspace.root), "data": data})


def ended(root: Path, how: str) -> list[str]:
    """Record the end of a run; return the trailers that anchor the log in its closing commit.

    A log that takes no events is only warned of: what has ended cannot be refused.

    Args:
        root: the run's folder, whose last commit is that of its last stage.
        how: the subject of the closing commit.
    """
    record = Record(root)
    params = record.read(str(RELATIVE.params))
    name = (yaml.safe_load(params) or {}).get("name", "") if params else ""
    try:
        _gates(record, root.name, how)
        _append(ENDED, root.name, {"model": name, "commit": _head(root), "how": how})
        log = open_log()
        heads = log.verified_heads() if log else {}
    except PedigreeError as error:
        logger.warning("the end of run %s is not in the audit log: %s", root.name, error)
        return []
    mine = {chain: head for chain, head in heads.items() if chain == PLATFORM or (name and chain.startswith(name))}
    return [f"{TRAILER}: {anchor_text(chain, head)}" for chain, head in sorted(mine.items())]


def _gates(record: Record, run: str, how: str) -> None:
    """Record whether the curated set has passed its gates; nothing of a run that ended before curation did."""
    report = record.read(f"{RELATIVE.report(CURATE)}/{VALIDATION}")
    if report is not None:
        passed = {"passed": True, "checks": len(json.loads(report)), "data": record.output(str(RELATIVE.curated))}
        _append(GATE, run, {"stage": CURATE, **passed})
    elif FAILED in how:
        _append(GATE, run, {"stage": CURATE, "passed": False, "reason": how})


def anchor(experiment: str) -> None:
    """Tag MLflow's experiment with the last event that this checkout has verified.

    Raises:
        TrackingError: MLflow does not answer.
    """
    log = open_log()
    if log and enabled() and (head := log.verified_heads().get(PLATFORM)):
        anchor_experiment(checked_client(), experiment, PLATFORM, head)


def gate_failed(request: IngestRequest | EvalsetRequest, error: Exception) -> None:
    """Record that a source's images did not pass their gate, so that nothing of them is stored."""
    _append(GATE, request.name, {"passed": False, "source": str(request.source), "reason": str(error)})


def ingested(request: IngestRequest | EvalsetRequest, report: IngestReport, pending: Iterable[Path]) -> None:
    """Record what an ingest has stored, by snapshot and data version; its validation has passed. No-op for nothing.

    Args:
        request: of the ingest.
        report: its result.
        pending: snapshots that are tracked and not yet announced, those of interrupted ingests too.
    """
    new = [folder for folder in (report.pool_snapshot, report.evaluation_snapshot) if folder]
    earlier = [folder for folder in pending if folder not in new]
    if earlier and (log := open_log()):  # their ingest may have been interrupted after its event
        events = [entry for entry in log.read(PLATFORM) if entry.action == INGESTED]
        earlier = [folder for folder in earlier if not any(str(folder) in e.details["data"] for e in events)]
    if not [*new, *earlier]:
        return
    counts = {key: getattr(report, key) for key in ("seen", "stored", "held_out", "already_present", "rejected")}
    details = {
        "source": str(request.source),
        "source_version": report.source_version,
        "license": request.license,
        "validation": "passed",
        "counts": counts,
        "data": {str(folder): _data_version(folder) for folder in [*new, *earlier]},
    }
    _append(INGESTED, request.name, details)


def _data_version(snapshot: Path) -> str | None:
    text = snapshot.with_name(f"{snapshot.name}.dvc").read_text()
    return yaml.safe_load(text)["outs"][0]["md5"]


def _append(action: str, subject: str, details: dict[str, Any]) -> None:
    if log := open_log():
        log.append(Event(PLATFORM, action, subject, person(Path()) or user_name(), details))


def _head(root: Path) -> str:
    return git(root, "rev-parse", "HEAD")
