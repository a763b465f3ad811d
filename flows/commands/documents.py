"""`pedigree documents`: what a registered version was made from, in standard formats."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.registry.documents.registered import Written


@command(services=True)
def documents(
    reference: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS|NAME/NUMBER", help="A released model or a candidate.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New or empty, or with documents of before.")],
) -> Answer:
    """Write the documents of a model: Croissant, CycloneDX, SLSA, PROV, OpenLineage, EU training-content summary.

    They are made anew from its trace and compared with those that were
    registered with the model, which its signature covers. Ends with 1 when
    one differs, or when the trace is incomplete; they are written all the
    same. They hold no names of people, and no absolute paths.

    Examples:
      pedigree documents pedigree@champion --out documents

      pedigree documents pedigree-candidates@latest --out documents --json
    """
    from components.registry.documents.registered import write_documents
    from components.registry.publish import one_line_errors

    with one_line_errors():
        found = write_documents(reference, Path.cwd(), out)
    problems = [f"incomplete: {line}" for line in found.missing]
    problems += [f"differs from the registered one: {name}" for name in found.differing or ()]
    return Answer(found.as_dict(), partial(_show, found), problems, exit_code=int(bool(problems)))


def _show(found: Written) -> None:
    from components.registry.documents.write import KINDS

    console = answer_console()
    console.print(f"{found.version}: {len(found.sha256)} documents in {found.folder}", markup=False)
    for name in found.sha256:
        if found.differing is None:
            state = "[yellow]not registered[/]"
        else:
            state = "[red]differs[/]" if name in found.differing else "[green]as registered[/]"
        console.print(f"  {name:<21} {state}  {KINDS[name]}")
