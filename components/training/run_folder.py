"""Files and progress of an unfinished training. Imports no torch, so that the CLI can read them."""

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
    """Status of an unfinished training; values that are not known yet, or only on S3, are None."""

    stage: str
    run_key: str
    process: int | None  # pid of the trainer; None: stopped, and resumable
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
    """Return the folder name of a complete checkpoint."""
    return f"step_{step}"


def step_folders(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run on this disk: step -> folder."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def find_trainings(root: Path, now: float) -> list[TrainStatus]:
    """Return the unfinished trainings below `root`/.pedigree, running ones first.

    Args:
        root: Pedigree's folder.
        now: reference of ages, in seconds since 1970.
    """
    found = []
    for path in Layout(root).checkpoints().glob(f"*/{TRAINING_CONFIG}"):
        with suppress(FileNotFoundError):  # just delivered, and its checkpoints deleted
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
