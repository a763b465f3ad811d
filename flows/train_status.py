"""`pedigree train-status`: how far the trainings on this machine's disk are, from the files that they write."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from components.core.layout import Layout
from components.core.locks import record_holder
from components.training.alerts import read_alerts
from components.training.loss_table import LOSSES, Row, read_rows

NOTHING = "nothing trains here, and no training is left unfinished"


@dataclass(frozen=True)
class TrainStatus:
    """One training that is not delivered yet; what is not known (so early, or on S3) is None."""

    stage: str
    run_key: str
    process: int | None  # that trains it; None: it was stopped, and starts again where it was
    step: int
    steps: int
    loss: float | None
    images_per_second: float | None
    seconds_left: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    checkpoint_uri: str | None
    alerts: list[str]


def train_status(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")] = False,
) -> None:
    """Say how far each unfinished training is: step, loss, speed, time left, age of its checkpoint, alerts.

    Examples:
      pedigree train-status

      pedigree train-status --json | jq '.[].seconds_left'
    """
    found = find_trainings(Path.cwd(), time.time())
    if as_json:
        sys.stdout.write(json.dumps([asdict(status) for status in found], indent=2) + "\n")
        return
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


def find_trainings(root: Path, now: float) -> list[TrainStatus]:
    """The trainings below `root`/.pedigree that have begun and are not delivered, running ones first.

    Args:
        root: Pedigree's folder.
        now: time in seconds since 1970, which ages are counted to.
    """
    found = []
    for path in Layout(root).checkpoints().glob("*/config.json"):
        with suppress(FileNotFoundError):  # it is being delivered: its checkpoints go
            found.append(_read(path.parent, now))
    return sorted(found, key=lambda status: (status.process is None, status.stage, status.run_key))


def _read(folder: Path, now: float) -> TrainStatus:
    begun = json.loads((folder / "config.json").read_text())
    rows, config, process = read_rows(folder / LOSSES), begun["config"], record_holder(folder / "lock")
    last: Row = rows[-1] if rows else {}
    step, rate = int(last.get("step") or 0), last.get("images_per_second")
    left = (config["steps"] - step) * config["batch_size"] / rate if rate and process is not None else None
    kept = {int(path.name.removeprefix("step_")): path.stat().st_mtime for path in folder.glob("step_*")}
    newest = max(kept, default=None)
    return TrainStatus(
        stage=begun["stage"],
        run_key=begun["run_key"],
        process=process,
        step=max(step, newest or 0),
        steps=config["steps"],
        loss=last.get("loss_total"),
        images_per_second=rate,
        seconds_left=left,
        checkpoint_step=newest,
        checkpoint_age_seconds=None if newest is None else now - kept[newest],
        checkpoint_uri=config.get("checkpoint_uri"),
        alerts=[alert.message for alert in read_alerts(folder)],
    )


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
