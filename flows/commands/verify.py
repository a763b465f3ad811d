"""`pedigree verify`: whether a registered version is, byte for byte, what was let in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.commands.decorators import Answer, command

if TYPE_CHECKING:
    from components.lineage.verify import Verification


@command(services=True)
def verify(
    reference: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS|NAME/NUMBER", help="A released model or a candidate.")
    ],
) -> Answer:
    """Check a registered model, from its bytes.

    Downloads it and compares a released model with its signature, its tags and the digest of its audit event,
    a candidate with its tags. Ends with 1 when anything differs, and lists the files that do.

    Examples:
      pedigree verify pedigree@champion

      pedigree verify pedigree-candidates@latest

      pedigree verify pedigree/3 --json | jq .differing
    """
    from components.lineage.verify import verify as verification

    found = verification(reference, Path.cwd())
    problems = [f"{what}: {wrong}" for what, wrong in found.checks.items() if wrong]
    problems += [f"differs: {path}" for path in found.differing]
    return Answer(found.as_dict(), partial(_show, found), problems, exit_code=int(not found.holds))


def _show(found: Verification) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{found.version}: {found.files} files, digest {found.digest}", markup=False)
    for what, wrong in found.checks.items():
        console.print(f"  {what:<12} {'[red]differs[/]' if wrong else '[green]agrees[/]'}")
