"""`loss.csv`: a training's rows, one every few steps. No torch here, so that the CLI can read it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

LOSSES = "loss.csv"  # in a run's folder, beside its checkpoints, and in its report
Row = dict[str, float | None]  # empty where something does not apply, such as GPU hours without a GPU


def read_rows(path: Path) -> list[Row]:
    """The rows of the file, if there is one; a line that is only half written is left out."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text().rpartition("\n")
    rows = csv.DictReader(io.StringIO(whole + newline))
    return [{"step": int(row.pop("step")), **{k: float(v) if v else None for k, v in row.items()}} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace the file."""
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, row)


def append_row(path: Path, row: Row) -> None:
    """Add a row, under a header if it is the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
