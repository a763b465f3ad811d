"""`pedigree up`: start the local stack."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from flows.commands.decorators import command
from flows.commands.status import status
from infra.local import supervisor


@command()
def up() -> None:
    """Start the local stack, or its missing services."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        with console.status("starting the local stack (about 10 seconds the first time)"):
            supervisor.up(Path.cwd(), report=lambda line: console.print(line, markup=False, highlight=False))
    except KeyboardInterrupt as error:
        console.print("interrupted: what had been started is stopped again", style="yellow")
        raise typer.Exit(130) from error
    status()
