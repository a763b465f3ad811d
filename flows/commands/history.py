"""`pedigree history`: list the champions of a model, with who decided and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from components.core.user import REVIEWER
from flows.commands.decorators import Answer, answer_console, command
from flows.commands.times import parse_time

if TYPE_CHECKING:
    from components.lineage.champions import Reign


@command(services=True, role=REVIEWER)
def history(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The released model.")],
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Who was champion then: 2026-11-29 or 2026-11-29T14:30+01:00.")
    ] = None,
) -> Answer:
    """List the champions of a model from the audit log: when, by whose decision and why.

    Changes of the registry without an audit event, such as an alias that was
    moved in MLflow's page, are listed too; the exit code is then 1.

    Examples:
      pedigree history pedigree

      pedigree history pedigree --at 2026-11-29
    """
    from components.lineage.champions import reigns
    from components.registry.publish import one_line_errors
    from components.registry.standing import Standing

    time = parse_time("--at", at) if at else None
    with one_line_errors():
        standing = Standing.read(name)
        settled = standing.settle()
        unexplained = standing.unexplained()
    found = reigns(standing.entries)
    if time:
        found = [reign for reign in found if reign.holds(time)]
    rejections = [entry for entry in standing.entries if entry.action == "reject"]
    data = {
        "name": name,
        "champion": standing.champion,
        "previous": standing.previous,
        "reigns": [dataclasses.asdict(reign) for reign in found],
        "rejected": [dataclasses.asdict(entry) for entry in rejections],
        "unexplained": unexplained,
    }
    notes = ["a change that was cut short is finished: the aliases are where the audit log has them"] if settled else []
    problems = [f"not explained by any audit event: {line}" for line in unexplained]
    show = partial(_show, name, found, notes, len(rejections) if not time else 0, at)
    return Answer(data, show, problems, 1 if unexplained else 0)


def _show(name: str, found: Sequence[Reign], notes: Sequence[str], rejections: int, at: str | None) -> None:
    console = answer_console()
    for line in notes:
        console.print(line)
    if not found:
        console.print(f"{name} had no champion{f' at {at}' if at else ' yet'}")
    else:
        table = Table("champion", "from", "until", "by", "why", box=None, pad_edge=False)
        for reign in found:
            event = reign.event
            why = [f"{event.action}, event {event.sequence}: {event.details['reason']}"]
            why += [f"waived {gate}: {reason}" for gate, reason in event.details.get("waived", {}).items()]
            until = reign.until[:19] if reign.until else "now"
            table.add_row(reign.version, reign.since[:19], until, Text(event.actor), Text("\n".join(why)))
        console.print(table, soft_wrap=False)
    if rejections:
        console.print(f"{rejections} candidates were rejected; --json has them")
