"""`pedigree runs`: list runs with their state, outcome and disk space."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from components.core.layout import Layout
from components.core.mlflow_client import TrackingError, checked_client, server_uri
from components.lineage.keeping import only_needed_by
from components.lineage.needs import Needs
from components.lineage.removal import own_bytes
from components.lineage.runs import FINISHED, Run, find_runs, registered
from components.lineage.stored import DiskStore, object_path, objects
from flows.commands.decorators import Answer, command
from infra.local import supervisor
from infra.local.site import StackError

FILE_WIDTH = 300  # characters of a line


@dataclass(frozen=True)
class Row:
    """One displayed run; sizes in bytes, times in ISO 8601."""

    run: str
    branch: str
    started: str | None
    ended: str | None
    state: str
    outcome: str
    registered: list[str]
    bytes_objects: int  # of DVC objects in the cache that no other run and no other branch needs
    bytes_folder: int  # of its worktree, where that is kept, without what is linked to the cache


@command()
def runs() -> Answer:
    """List the runs of this repository, newest first: time, state, registered versions, disk space.

    A run is lost if its process ended without a closing commit. Works without the services; they only add
    which versions are champions.

    Examples:
      pedigree runs

      pedigree runs --json | jq '.runs[] | select(.state == "failed") | .outcome'
    """
    root = Path.cwd()
    champions, note = _champions(root)
    found = find_runs(root)
    sizes = _sizes(root, found)
    rows = [_row(root, run, champions, sizes.get(run.id, 0)) for run in found]
    data = {"runs": [asdict(row) for row in rows], "notes": [note] if note else []}
    return Answer(data, partial(_show, rows, note))


def _show(rows: list[Row], note: str | None) -> None:
    console = wide_console()
    if not rows:
        console.print("no runs yet; `pedigree run` makes one")
        return
    console.print(_table(rows))
    if note:
        console.print(note, markup=False)


def wide_console() -> Console:
    """Return a console whose tables fit the terminal, or are wide enough in a file to keep lines whole."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)


def _row(root: Path, run: Run, champions: Mapping[str, str], size: int) -> Row:
    made = [f"{version['name']} {version['version']}" for version in registered(root, run)]
    return Row(
        run=run.id,
        branch=run.branch,
        started=_time(run.started),
        ended=_time(run.ended),
        state=run.state,
        outcome=_outcome(run, [f"{name} ({champions[name]})" if name in champions else name for name in made]),
        registered=made,
        bytes_objects=size,
        bytes_folder=own_bytes(run.folder) if run.folder else 0,
    )


def _outcome(run: Run, made: Sequence[str]) -> str:
    """Describe a run's outcome."""
    parts = [run.reason] if run.reason else []
    if run.state == FINISHED and not run.computed:
        parts.append("nothing computed")
    return "; ".join([*parts, *([", ".join(made)] if made else [])])


def _champions(root: Path) -> tuple[dict[str, str], str | None]:
    """Map `NAME-candidates 3` to `champion as NAME 1`; also return a line if the registry does not answer."""
    from components.lineage.claims import champions

    try:
        os.environ.update(supervisor.connect(root, start=False))
        if server_uri() is None:
            raise TrackingError("MLFLOW_TRACKING_URI is not set")
        return champions(checked_client()), None
    except (StackError, TrackingError) as error:
        return {}, f"champions are not shown: {error}"


def _sizes(root: Path, found: Sequence[Run]) -> dict[str, int]:
    disk = DiskStore(Layout(root).dvc_cache)
    there = objects(disk.listing())
    needs = Needs(root, lambda id_: disk.read(object_path(id_)))
    return {
        name: sum(there[id_].size for id_ in ids if id_ in there)
        for name, ids in only_needed_by(root, found, needs).items()
    }


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        box=None, pad_edge=False, caption_justify="left",
        caption="size: DVC objects in the cache that only this run needs + its folder, where that is kept",
    )  # fmt: skip
    for column in ("run", "started", "ended", "state", "outcome", "size"):
        table.add_column(column, overflow="fold", no_wrap=column == "run")
    for row in rows:
        size = f"{in_words(row.bytes_objects)} + {in_words(row.bytes_folder)}"
        table.add_row(row.run, _age(row.started), _age(row.ended), row.state, row.outcome, size)
    return table


def _age(when: str | None) -> str:
    if when is None:
        return "-"
    seconds = time.time() - datetime.fromisoformat(when).timestamp()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def in_words(size: float) -> str:
    """Return a number of bytes as text, such as `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
