"""`pedigree down`: stop the local stack."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from flows import live
from flows.commands.decorators import command
from infra.local import supervisor


@command()
def down() -> None:
    """Stop every process of the local stack; its data stays in .pedigree."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in live.stop_running(Path.cwd()):
        console.print(line, markup=False)
    stopped = supervisor.down(Path.cwd())
    console.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")
