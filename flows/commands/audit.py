"""`pedigree audit log`, `verify` and `export`: the audit log to read, to check, and to take away."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from components.core.config import ConfigError
from components.core.errors import TRY_AGAIN, ServiceError
from components.core.user import REVIEWER
from flows.commands.decorators import Answer, answer_console, command
from flows.commands.times import parse_time

if TYPE_CHECKING:
    from components.lineage.audit_chain import Entry
    from components.lineage.audit_verify import AuditReport

SHORT = 100  # characters of an event's details in the table


@command(services=True, role=REVIEWER)
def log(
    chain: Annotated[
        str | None, typer.Argument(metavar="CHAIN", help="NAME, NAME-candidates or _platform; all without it.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Such as 2026-11-29 or 2026-11-29T14:30.")] = None,
    action: Annotated[str | None, typer.Option(help="Only these, such as promote or run-ended.")] = None,
) -> Answer:
    """List the events of the audit log, oldest first; what is listed is verified.

    Decisions on a model are in the chain of its name, registrations in that of
    NAME-candidates, runs, ingests and their gates in _platform.

    Examples:
      pedigree audit log

      pedigree audit log pedigree --action promote

      pedigree audit log _platform --since 2026-11-29 --json | jq '.[].subject'
    """
    from components.lineage.audit_log import AuditLog

    audit, begin = AuditLog.from_environment(), parse_time("--since", since) if since else None
    names = audit.names()
    if chain is not None and chain not in names:
        raise ConfigError(f"{chain}: no such chain; the log has {', '.join(sorted(names)) or 'none yet'}")
    entries = [entry for name in ([chain] if chain else names) for entry in audit.read(name)]
    entries = [entry for entry in entries if action in (None, entry.action)]
    if begin:
        entries = [entry for entry in entries if datetime.datetime.fromisoformat(entry.time) >= begin]
    entries.sort(key=lambda entry: entry.time)
    return Answer([dataclasses.asdict(entry) for entry in entries], partial(_show_events, entries))


@command(services=True, role=REVIEWER)
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Check a file of `pedigree audit export` instead.")
    ] = None,
) -> Answer:
    """Check the whole audit log, and name every fault.

    For each chain: hashes, order, signatures by known keys; of each event
    that it is locked, until when, and that nothing was written over it or
    marks it as deleted; and the anchors in git and MLflow, which show a
    chain whose end was cut off. Ends with 1 where something is wrong, with 75
    where a service does not answer.

    Examples:
      pedigree audit verify

      pedigree audit verify --json | jq .chains

      pedigree audit verify audit.jsonl
    """
    from components.lineage.audit_verify import verify_file

    try:
        report = verify_file(file) if file else _verify_log()
    except ServiceError as error:
        return Answer({"holds": None, "error": str(error)}, lambda: None, [f"error: {error}"], TRY_AGAIN)
    return Answer(report.as_dict(), partial(_show_report, report), report.faults, int(bool(report.faults)))


@command(services=True, role=REVIEWER)
def export(out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")]) -> Answer:
    """Write the audit log to one file, with locks, signatures and public keys.

    Whoever has the file can check it without S3, MLflow or git:
    `pedigree audit verify FILE`.

    Examples:
      pedigree audit export --out audit.jsonl
    """
    from components.lineage.audit_log import AuditLog
    from components.lineage.audit_verify import export_log

    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    count = export_log(AuditLog.from_environment(), out)
    return Answer({"file": str(out), "events": count}, lambda: answer_console().print(f"{count} events in {out}"))


def _verify_log() -> AuditReport:
    """Check the log with the anchors of this repository and, where it is there, of MLflow."""
    from components.core.mlflow_client import checked_client
    from components.lineage.audit_anchors import git_anchors, mlflow_anchors
    from components.lineage.audit_log import AuditLog
    from components.lineage.audit_verify import verify_log

    anchors = [*git_anchors(Path.cwd()), *mlflow_anchors(checked_client())]
    return verify_log(AuditLog.from_environment(), anchors)


def _show_events(entries: Sequence[Entry]) -> None:
    console = answer_console()
    if not entries:
        console.print("no events")
        return
    table = Table("time (UTC)", "chain", "event", "action", "subject", "by", "", box=None, pad_edge=False)
    for entry in entries:
        values = (entry.time[:19], entry.name, str(entry.sequence), entry.action, entry.subject, entry.actor)
        table.add_row(*map(Text, values), Text(_short(entry.details)))
    console.print(table, soft_wrap=False)


def _short(details: dict[str, Any]) -> str:
    told = details.get("reason") or details.get("how") or details.get("verdict")
    text = str(told) if told else ", ".join(f"{k} {v}" for k, v in details.items() if isinstance(v, str | int))
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def _show_report(report: AuditReport) -> None:
    console = answer_console()
    table = Table("chain", "events", "unsigned", "locked until", "head", "", box=None, pad_edge=False)
    for one in report.chains:
        until = f"{one.until:%Y-%m-%d}" if one.until else "-"
        head = one.entries[-1].hash[:12] if one.entries else "-"
        state = f"[red]{len(one.faults)} faults[/]" if one.faults else "[green]agrees[/]"
        table.add_row(Text(one.chain), str(len(one.entries)), str(one.unsigned), until, head, state)
    console.print(table, soft_wrap=False)
    console.print(f"{report.place}: {report.anchors} anchors compared", markup=False)
    for note in report.notes:
        console.print(note, markup=False)
