"""`pedigree diff`: compare two data versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from components.core.storage import write_bytes
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.lineage.data_diff import DataDiff

MAX_SHOWN = 5  # rows of each table on the terminal
FORMS = "A DVC id, a run id, a revision, or NAME@ALIAS."


@command(services=True)
def diff(
    before: Annotated[str, typer.Argument(metavar="DATA_A", help=FORMS)],
    after: Annotated[str, typer.Argument(metavar="DATA_B", help=FORMS)],
    pool: Annotated[
        bool, typer.Option("--pool", help="Of a run, revision or model: its pool, not its curated set.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures too.")] = None,
) -> Answer:
    """Compare two data versions: images added, removed, or in or out for another reason, and shifts of shares.

    Examples:
      pedigree diff pedigree@previous pedigree@champion

      pedigree diff 20261124-061145-0635 20261125-061145-1b2c --pool

      pedigree diff 7b1b22ed79f889d06b9a72a74c752f99.dir e6088c50ded94ba4d9440660fd6ec2b8.dir --html diff.html
    """
    from components.lineage.data_diff import compare, find_side, render_diff

    root = Path.cwd()
    found = compare(find_side(before, root, pool), find_side(after, root, pool), root)
    if html is not None:
        write_bytes(html, render_diff(found, root))
    return Answer(_as_dict(found), partial(_show, found, html))


def _as_dict(found: DataDiff) -> dict[str, Any]:
    changes = [{"before": a, "after": b, "images": count} for a, b, count in found.changes]
    return {**asdict(found), "changes": changes, "added": found.added, "removed": found.removed}


def _show(found: DataDiff, html: Path | None) -> None:
    console = answer_console()
    console.print(Text(f"from {found.before.name}\nto   {found.after.name}"))
    added, removed = len(found.added), len(found.removed)
    counts = f"{added:,} added, {removed:,} removed, {found.changed:,} for another reason"
    console.print(f"{found.images[0]:,} -> {found.images[1]:,} images: {counts}")
    for table in _tables(found):
        console.print(table, soft_wrap=False)
    if html is not None:
        console.print(Text(f"pictures and all rows: {html}"))


def _tables(found: DataDiff) -> Iterator[Table]:
    if found.changes:
        table = Table("before", "after", "images", box=None, pad_edge=False)
        for state, other, count in found.changes[:MAX_SHOWN]:
            table.add_row(state, other, f"{count:,}")
        yield _with_rest(table, len(found.changes))
    for name, shifts in found.shifts.items():
        moved = [shift for shift in shifts if shift.before != shift.after]
        if moved:
            heading = "class" if name == "label" else name
            table = Table(heading, "before", "after", "share", box=None, pad_edge=False)
            for shift in moved[:MAX_SHOWN]:
                table.add_row(Text(shift.value), f"{shift.before:,}", f"{shift.after:,}", f"{100 * shift.share:+.2f} %")
            yield _with_rest(table, len(moved))


def _with_rest(table: Table, count: int) -> Table:
    if count > MAX_SHOWN:
        table.add_row(Text(f"and {count - MAX_SHOWN} more; --json lists all", "dim"))
    return table
