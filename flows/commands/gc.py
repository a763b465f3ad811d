"""`pedigree gc`: remove old runs and the bytes that nothing else needs."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from components.core.config import ConfigError
from components.core.layout import RELATIVE, Layout
from components.core.user import ADMIN
from flows.commands.decorators import Answer, command
from flows.commands.runs import in_words, wide_console
from flows.gc_lock import no_run_beside
from infra.local.compaction import compact_storage

if TYPE_CHECKING:
    from components.lineage.removal import Removal
    from components.lineage.upkeep import Plan

AGE = re.compile(r"(\d+)([dh])")
SECONDS = {"d": 86_400, "h": 3_600}


@command(services=True, role=ADMIN)
def gc(
    keep: Annotated[int, typer.Option(min=0, help="Keep this many of the newest runs.")],
    older: Annotated[str, typer.Option(metavar="AGE", help="Remove only what is older: 30d, 12h; 0d is any age.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
) -> Answer:
    """Remove old runs, and the DVC objects, run-cache entries, checkpoints and caches that nothing else needs.

    A run is kept if it is among the newest, younger than AGE, or referred to by a registered version, the audit
    log or the parameters of a kept run. So a registered version can always be traced and its data pulled.
    Every other branch, tag and worktree keeps its data, and all ingested data that their history names.
    Refuses to start during a run; can be killed and run again at any time.

    Examples:
      pedigree gc --keep 10 --older 30d --dry-run

      pedigree gc --keep 10 --older 30d

      pedigree gc --keep 0 --older 12h --json | jq .freed
    """
    from components.lineage.audit_log import AuditLog
    from components.lineage.keeping import Rule
    from components.lineage.ledger import Ledger
    from components.lineage.removal import disk_bytes
    from components.lineage.upkeep import make_plan
    from components.registry.publish import registry_client

    rule, root = Rule(keep, time.time() - _seconds(older)), Path.cwd()
    with ExitStack() as locks:
        client, log = registry_client(), AuditLog.from_environment()
        locks.enter_context(no_run_beside(root))
        locks.enter_context(Ledger(root).held())
        folders = (Layout(root).state, Layout(root).dvc_cache)
        before = disk_bytes(*folders)
        plan = make_plan(root, Layout(root).dvc_cache, rule, client, log)
        if not dry_run:
            plan.carry_out()
            compact_storage(root)
        after = disk_bytes(*folders)
    return Answer(_as_dict(plan, dry_run, before, after), partial(_show, plan, dry_run, before, after))


def _seconds(older: str) -> int:
    match = AGE.fullmatch(older)
    if match is None:
        raise ConfigError(f"--older {older}: not an age; write days or hours, such as 30d, 12h or 0d")
    return int(match[1]) * SECONDS[match[2]]


def _as_dict(plan: Plan, dry_run: bool, before: int, after: int) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": {
            removal.kind: {"count": len(removal.found), "bytes": removal.freed, "left_bytes": removal.left,
                           "names": list(removal.found)}
            for removal in plan.removals
        },
        "freed": sum(removal.freed for removal in plan.removals),
        "kept_runs": plan.kept_runs,
        "notes": plan.notes,
        "disk": {"before": before, "after": after},
    }  # fmt: skip


def _show(plan: Plan, dry_run: bool, before: int, after: int) -> None:
    console = wide_console()
    table = Table(box=None, pad_edge=False)
    for column in ("kind", "would go" if dry_run else "removed", "bytes", "left", "such as"):
        table.add_column(column, justify="right" if column not in ("kind", "such as") else "left", overflow="fold")
    for removal in plan.removals:
        table.add_row(*_cells(removal))
    console.print(table)
    freed = sum(removal.freed for removal in plan.removals)
    on_disk = f"disk ({RELATIVE.state}, {RELATIVE.dvc_cache}): {in_words(before)} before"
    console.print(f"would free {in_words(freed)}; {on_disk}" if dry_run else
                  f"freed {in_words(freed)}; {on_disk}, {in_words(after)} after")  # fmt: skip
    for kind, count in Counter(why.split(": ")[0] for why in plan.kept_runs.values()).items():
        name, why = next((name, why) for name, why in plan.kept_runs.items() if why.startswith(f"{kind}: "))
        console.print(f"kept as {kind}: {count} runs, e.g. {name} ({why.removeprefix(f'{kind}: ')})", markup=False)
    if any(why.startswith("registered: ") for why in plan.kept_runs.values()):
        console.print("a run goes once the versions that it registered are deleted in MLflow, and it is old enough")
    for note in plan.notes:
        console.print(note, markup=False)


def _cells(removal: Removal) -> list[str]:
    example = next(iter(removal.found), "")
    return [removal.kind, f"{len(removal.found):,}", in_words(removal.freed), in_words(removal.left), example]
