"""`pedigree promote`, `reject` and `rollback`: decisions on versions, each with a reason that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from components.core.config import ConfigError
from components.core.user import REVIEWER
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.registry.promote import Decision

WHICH = "NAME@latest, the newest candidate; NAME-candidates/NUMBER; or a released NAME/NUMBER."
ReferenceArgument = Annotated[str, typer.Argument(metavar="VERSION", help=WHICH)]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit log.")]


@command(services=True, role=REVIEWER)
def promote(
    reference: ReferenceArgument,
    reason: ReasonOption,
    waive: Annotated[
        list[str] | None, typer.Option(metavar="GATE=REASON", help="Let a failed gate pass; can be repeated.")
    ] = None,
) -> Answer:
    """Make a version the champion of its model, if it passes the gates.

    Copies a candidate's verified bytes to where training does not write, adds
    an event to the audit log, then moves the alias `champion`; the champion
    before becomes `previous`. A version that fails a gate is refused, unless
    that gate is waived with a reason. Run it again after a crash: it finishes
    the rest. `pedigree review` shows the gates without deciding.

    Examples:
      pedigree promote pedigree@latest --reason "kNN 0.81, champion 0.78"

      pedigree promote pedigree-small-candidates/3 --reason "half the latency"
        --waive champion="kNN 0.01 lower is fine for the phone"
    """
    from components.registry import promote as decisions
    from flows.decisions import announce

    done = decisions.promote(reference, reason, Path.cwd(), _waivers(waive or ()))
    return _answer(done, announce(done))


@command(services=True, role=REVIEWER)
def reject(reference: ReferenceArgument, reason: ReasonOption) -> Answer:
    """Record that a candidate shall not become the champion.

    From then on its gate `rejection` fails: to promote it all the same, that
    gate must be waived. The champion stays what it is.

    Examples:
      pedigree reject pedigree@latest --reason "fails on night images"
    """
    from components.registry import promote as decisions
    from flows.decisions import announce

    done = decisions.reject(reference, reason)
    return _answer(done, announce(done))


@command(services=True, role=REVIEWER)
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The released model.")], reason: ReasonOption
) -> Answer:
    """Make the champion before the present one the champion again.

    Its released bytes are verified against the event that let them in; the
    candidate and the run that made it are not needed. A second rollback, for
    another reason, goes one champion further back.

    Examples:
      pedigree rollback pedigree --reason "version 4 fails on night images"
    """
    from components.registry import promote as decisions
    from flows.decisions import announce

    done = decisions.rollback(name, reason)
    return _answer(done, announce(done))


def _waivers(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for gate, separator, why in pairs:
        if not (gate.strip() and separator and why.strip()):
            raise ConfigError(f"--waive {gate}{separator}{why}: expected GATE=REASON, such as champion='0.01 is noise'")
    return {gate.strip(): why.strip() for gate, _, why in pairs}


def _answer(done: Decision, notes: Sequence[str]) -> Answer:
    problems = [f"not explained by any audit event, until now: {line}" for line in done.unexplained]
    return Answer(dataclasses.asdict(done), partial(_show, done, notes), problems)


def _show(done: Decision, notes: Sequence[str]) -> None:
    console = answer_console()
    if done.settled:
        console.print("a change that was cut short is finished: the aliases are where the audit log has them")
    if not done.changed:
        _show_unchanged(console, done)
        for note in notes:
            console.print(f"  note      {note}", markup=False)
        return
    if done.action == "reject":
        console.print(f"[bold]{done.version}[/] is rejected")
    else:
        console.print(f"[bold green]{done.name}@champion[/] is {done.version}, from {done.candidate}")
        console.print(f"  bytes     {done.source}", markup=False)
        console.print(f"  previous  {done.previous or 'none'}", markup=False)
    event = done.event
    console.print(f"  event     {event.sequence} by {event.actor}, hash {event.hash[:12]}", markup=False)
    for gate, why in event.details.get("waived", {}).items():
        console.print(f"  waived    {gate}: {why}", markup=False)
    for note in notes:
        console.print(f"  note      {note}", markup=False)
    console.print(f"  next      pedigree history {done.name}", markup=False)


def _show_unchanged(console: Console, done: Decision) -> None:
    if done.action == "reject":
        console.print(f"{done.version} is rejected already, for this reason (event {done.event.sequence})")
        return
    console.print(f"{done.candidate} is the champion of {done.name} already ({done.version}); nothing to do")
    if done.action == "rollback":
        console.print("the last event is this rollback; give another --reason to go further back")
