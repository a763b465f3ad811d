"""Read and write `loss.csv`, a training's rows. Imports no torch, so that the CLI can read it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TextIO

from components.core.storage import write_bytes

LOSSES = "loss.csv"  # in a run's folder, beside its checkpoints, and in its report
Row = dict[str, float | None]  # None if not applicable, such as GPU hours without a GPU


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the file, if it exists; a half-written last line is ignored."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text().rpartition("\n")
    rows = csv.DictReader(io.StringIO(whole + newline))
    return [{"step": int(row.pop("step")), **{k: float(v) if v else None for k, v in row.items()}} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace the file atomically."""
    text = io.StringIO()
    _write(text, rows)
    write_bytes(path, text.getvalue().encode())


def append_row(path: Path, row: Row) -> None:
    """Append a row; write the header before the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        _write(file, [row])


def _write(file: TextIO, rows: list[Row]) -> None:
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    if rows and not file.tell():
        writer.writeheader()
    writer.writerows(rows)
