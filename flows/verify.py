"""Verify everything once a week: every released version, every alias and the whole audit log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed

from components.core.user import user_name
from flows.failure import failed
from infra.local import supervisor

if TYPE_CHECKING:
    from components.lineage.verify import Verification

KEY = "verify"  # of the artifact
SHOWN = 100  # faults in an artifact and an event, which have a limit; the command shows all


@flow(name="verify", persist_result=False)
def verify(target: str | None = None, sample: float | None = None) -> State[Any]:
    """Verify registered models from bytes; the result is an artifact and an audit event. Fails if anything differs.

    Args:
        target: NAME@alias or NAME/number; None means every released version, every alias and the whole log.
        sample: share of the bytes of shards to read; None means the default of `pedigree verify`.
    """
    try:
        os.environ.update(supervisor.connect(Path.cwd(), start=False))
        return _verify(target, sample)
    except Exception as error:
        return failed(error)


def _verify(target: str | None, sample: float | None) -> State[Any]:
    from components.lineage.audit_log import PLATFORM, AuditLog, Event
    from components.lineage.verify import SAMPLE, Extent
    from components.lineage.verify import verify as verification

    found = verification(target, Path.cwd(), Extent(SAMPLE if sample is None else sample))
    create_markdown_artifact(markdown(found), key=KEY, description=f"Verification of {found.target}")
    details = {**found.as_dict(), "faults": found.faults[:SHOWN], "num_faults": len(found.faults)}
    entry = AuditLog.from_environment().append(Event(PLATFORM, KEY, found.target, user_name(), details))
    told = f"event {entry.sequence} of {PLATFORM}"
    if found.holds:
        return Completed(message=f"{found.target}: all agrees, {told}")
    return Failed(message=f"{found.target}: {len(found.faults)} faults, {told}: {found.faults[0]}")


def markdown(found: Verification) -> str:
    """Return what was found, with the faults as a list."""
    faults = [f"- {line}" for line in found.faults[:SHOWN]]
    if left := len(found.faults) - len(faults):
        faults.append(f"- and {left} more: `pedigree verify`")
    return "\n\n".join([*found.summary(), "\n".join(faults)])
