"""The folder of a training that is not delivered yet: its files, and how far it is. No torch: the CLI reads it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.core.layout import TRAINING_CONFIG, TRAINING_LOCK, Layout
from components.core.locks import record_holder
from components.training.alerts import read_alerts
from components.training.loss_table import LOSSES, Row, read_rows

_STEP = re.compile(r"step_(\d+)")


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


def step_folder(step: int) -> str:
    """Name of a whole checkpoint's folder."""
    return f"step_{step}"


def step_folders(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a run on this disk: step -> folder."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def find_trainings(root: Path, now: float) -> list[TrainStatus]:
    """The trainings below `root`/.pedigree that have begun and are not delivered, running ones first.

    Args:
        root: Pedigree's folder.
        now: time in seconds since 1970, which ages are counted to.
    """
    found = []
    for path in Layout(root).checkpoints().glob(f"*/{TRAINING_CONFIG}"):
        with suppress(FileNotFoundError):  # it is being delivered: its checkpoints go
            found.append(_read(path.parent, now))
    return sorted(found, key=lambda status: (status.process is None, status.stage, status.run_key))


def _read(folder: Path, now: float) -> TrainStatus:
    begun = json.loads((folder / TRAINING_CONFIG).read_text())
    rows, config, process = read_rows(folder / LOSSES), begun["config"], record_holder(folder / TRAINING_LOCK)
    last: Row = rows[-1] if rows else {}
    step, rate = int(last.get("step") or 0), last.get("images_per_second")
    left = (config["steps"] - step) * config["batch_size"] / rate if rate and process is not None else None
    saved = {step: path.stat().st_mtime for step, path in step_folders(folder).items()}
    newest = max(saved, default=None)
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
        checkpoint_age_seconds=None if newest is None else now - saved[newest],
        checkpoint_uri=config.get("checkpoint_uri"),
        alerts=[alert.message for alert in read_alerts(folder)],
    )
