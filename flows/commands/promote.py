"""`pedigree promote`: make a candidate the champion, with a reason that is kept."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from components.core.user import REVIEWER
from flows.commands.decorators import Answer, command

if TYPE_CHECKING:
    from components.registry.promote import Promotion


@command(services=True, role=REVIEWER)
def promote(
    reference: Annotated[str, typer.Argument(metavar="NAME@latest|NAME/NUMBER", help="A version of NAME-candidates.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it goes into the audit log.")],
) -> Answer:
    """Make a candidate the champion of its model.

    Copies the candidate's verified bytes to where training does not write,
    adds an event to the audit log, then moves the alias `champion`; the
    champion before becomes `previous`. Run it again after a crash: it finishes
    the rest.

    Examples:
      pedigree promote pedigree@latest --reason "kNN 0.81, champion 0.78"

      pedigree promote pedigree-small/3 --reason "half the latency, same kNN" --json
    """
    from components.registry import promote as promotion

    done = promotion.promote(reference, reason)
    return Answer(dataclasses.asdict(done), partial(_show, done))


def _show(done: Promotion) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if done.event is None:
        console.print(
            f"{done.candidate} is the champion of {done.name} already (version {done.version}); nothing to do"
        )
        return
    console.print(f"[bold green]{done.name}@champion[/] is version {done.version}, from {done.candidate}")
    console.print(f"  bytes     {done.source}", markup=False)
    console.print(f"  event     {done.event.sequence} by {done.event.actor}, hash {done.event.hash[:12]}", markup=False)
    console.print(f"  previous  {done.previous or 'none'}", markup=False)
    console.print(f"  next      pedigree trace {done.name}@champion", markup=False)
