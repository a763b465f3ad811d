"""`pedigree train-status`: show the progress of trainings on this machine's disk, from their files."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from components.training.run_folder import TrainStatus, find_trainings
from flows.commands.decorators import Answer, command

NOTHING = "no training is running or unfinished here"


@command(checkout=False)
def train_status() -> Answer:
    """Show each unfinished training: step, loss, speed, remaining time, age of its checkpoint, alerts.

    Examples:
      pedigree train-status

      pedigree train-status --json | jq '.[].seconds_left'
    """
    found = find_trainings(Path.cwd(), time.time())
    return Answer([asdict(status) for status in found], partial(_show, found))


def _show(found: list[TrainStatus]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if not found:
        console.print(NOTHING)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("training", "run", "state", "step", "loss", "images/s", "left", "checkpoint"):
        table.add_column(column, overflow="fold")
    for status in found:
        table.add_row(*_cells(status))
    console.print(table)
    for status in found:
        for alert in status.alerts:
            console.print(f"alert in {status.stage}: {alert}", style="yellow", markup=False)


def _cells(status: TrainStatus) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    checkpoint: Any = "none yet" if status.checkpoint_uri is None else status.checkpoint_uri
    if status.checkpoint_age_seconds is not None:
        checkpoint = f"step {status.checkpoint_step}, {_duration(status.checkpoint_age_seconds)} ago"
    return [
        status.stage,
        status.run_key[:8],
        "stopped" if status.process is None else f"process {status.process}",
        f"{status.step}/{status.steps}",
        number(status.loss, ".4f"),
        number(status.images_per_second, ".1f"),
        "-" if status.seconds_left is None else _duration(status.seconds_left),
        checkpoint,
    ]


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
