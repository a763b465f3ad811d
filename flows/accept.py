"""Accept a code change as irrelevant to a stage's outputs, so that the last outputs are reused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.config import ConfigError
from components.lineage.audit_log import AuditLog, Entry, Event
from components.lineage.code import list_of, read_list
from components.lineage.lock_file import Record, file_md5
from components.lineage.trace import ACCEPTED, outputs_of
from components.recipe import Recipe
from flows.preview import Preview, Step, open_preview
from flows.sources import choose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Acceptance:
    """Stages to accept by name (`evaluate` means all its items), and the reason."""

    stages: Sequence[str]
    reason: str

    @classmethod
    def parse(cls, stages: Sequence[str], reason: str | None) -> Acceptance:
        """Validate the options.

        Raises:
            ConfigError: stages or reason are missing.
        """
        if not stages:
            raise ConfigError("--reason says why a stage is accepted; name the stage too: --accept STAGE")
        if not (reason or "").strip():
            raise ConfigError("--accept needs a reason, which goes into the audit log: --reason TEXT")
        return cls(stages, str(reason).strip())

    def record(self, checkout: Path, recipe: Recipe, sources: Sequence[str] | None) -> list[str]:
        """Record the acceptances, so that a run of this recipe and code reuses the last run's outputs.

        The audit event is written first; a repeated call after a crash finds it.

        Returns:
            The accepted stages.

        Raises:
            ConfigError: a stage is unknown, or more than its code has changed; nothing is written.
            RecordError: the audit log is broken or refuses the event.
            LedgerError: the outputs of the last run are missing.
        """
        with open_preview(checkout, recipe, choose(checkout, sources)) as preview:
            steps = _selected(preview.steps, self.stages)
            if refused := [line for step in steps if (line := _refusal(step, steps, preview.last_run))]:
                raise ConfigError("\n".join(refused))
            for step in steps:
                assert preview.last is not None
                _write_event(recipe.name, step, preview, self.reason)
                preview.ledger.adopt(step.stage, preview.last.stages()[step.stage])
                log.info("%s: its outputs of run %s are accepted for the new code", step.stage, preview.last_run)
        return [step.stage for step in steps]


def _selected(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """Return the steps of the named stages that would run, in topological order."""
    for name in names:
        if not any(name in (step.stage, step.stage.partition("@")[0]) for step in steps):
            raise ConfigError(f"--accept {name}: no such stage; known: {', '.join(step.stage for step in steps)}")
    selected = [step for step in steps if {step.stage, step.stage.partition("@")[0]} & set(names)]
    for step in selected:
        if not _to_accept(step):
            log.info("%s: %s, so there is nothing to accept", step.stage, step.outcome)
    return [step for step in selected if _to_accept(step)]


def _to_accept(step: Step) -> bool:
    return step.outcome == "run" and bool(step.changes)


def _refusal(step: Step, accepted: Sequence[Step], last_run: str | None) -> str | None:
    """Explain why a stage cannot be accepted; None if only its code or accepted stages have changed."""
    if last_run is None:
        return f"--accept {step.stage}: no run has finished yet, so there are no outputs to accept"
    if others := [f"{change.kind}: {change.what}" for change in step.changes if change.kind != "code"]:
        return f"--accept {step.stage}: more than its code differs from run {last_run}: {'; '.join(others)}"
    if remade := sorted(set(step.after) - {other.stage for other in accepted}):
        return f"--accept {step.stage}: {', '.join(remade)} would make its inputs again; accept that too, or leave both"
    return None


def _write_event(name: str, step: Step, preview: Preview, reason: str) -> Entry:
    """Write the acceptance to the audit log, unless a crashed process already has."""
    from components.registry.promote import who

    assert preview.last is not None
    audit, path, by = AuditLog.from_environment(), list_of(step.stage), who(None)
    old, new = (read_list((r.read(path) or b"").decode()) for r in (preview.last, Record(preview.ledger.root)))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    details: dict[str, Any] = {
        "stage": step.stage,
        "run": preview.last_run,
        "code": file_md5(preview.ledger.root / path),
        "outputs": outputs_of(preview.last.stages()[step.stage]),
        "files": {key: [old.get(key), new.get(key)] for key in differing},
    }
    for entry in audit.read(name):
        if entry.action == ACCEPTED and details.items() <= entry.details.items():
            return entry
    details |= {"reason": reason, "actor_from": by["actor_from"]}
    return audit.append(Event(name, ACCEPTED, f"{preview.last_run}/{step.stage}", by["actor"], details))
