"""`pedigree sources`: list and remove the sources of the pool and of the evaluation sets."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.core.config import ConfigError
from flows.commands.decorators import Answer, command
from flows.commands.runs import in_words, wide_console
from flows.pool_lock import pool_held
from flows.sources import COLLECTIONS, EVALUATION, POOL, SAMPLE, Snapshot, num_images, snapshots

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One displayed source; counts are None if a snapshot's data is not in this checkout."""

    source: str
    taken_by: str  # the runs that use it
    training_images: int | None  # of all its snapshots; images given to several runs count each time
    evaluation_images: int | None
    bytes: int
    snapshots: list[str]
    licenses: list[str]
    from_: list[str]  # folders or addresses
    ingested_at: str | None  # the latest time
    ingested_by: str | None  # at that time


@command()
def list_sources() -> Answer:
    """List the sources: images, license, origin, and which runs use them.

    `every run`: ingested by `pedigree ingest`. `its own run`: given by `pedigree run --images`, and used by no other
    run. Works without the services.

    Examples:
      pedigree sources list

      pedigree sources list --json | jq '.sources[] | select(.taken_by == "its own run") | .source'
    """
    found = snapshots(Path.cwd())
    names = sorted({one.source for one in found})
    rows = [_row(name, [one for one in found if one.source == name], found) for name in names]
    output = [{key.rstrip("_"): value for key, value in asdict(row).items()} for row in rows]
    return Answer({"sources": output}, partial(_show, rows))


def _show(rows: list[Row]) -> None:
    console = wide_console()
    if not rows:
        console.print("no sources; `pedigree ingest FOLDER --name NAME --license LICENSE` adds one")
        return
    console.print(_table(rows))


@command()
def remove(
    name: Annotated[str, typer.Argument(help="The source's name, as `pedigree sources list` shows it.")],
) -> None:
    """Remove a source from the pool and the evaluation sets: no later run uses it.

    Runs that used it are unchanged, and keep its bytes in DVC's cache and on S3; `pedigree gc` frees bytes that nothing
    needs.

    Examples:
      pedigree sources remove holiday-photos
    """
    from components.lineage.ledger import Ledger

    checkout = Path.cwd()
    folders = [folder for c in COLLECTIONS if (folder := checkout / c / name).is_dir()]
    if not name or not folders:
        known = ", ".join(sorted({one.source for one in snapshots(checkout)})) or "none"
        raise ConfigError(f"no source {name!r} in the pool; known: {known}")
    with pool_held(name, log):
        removed = [one for one in snapshots(checkout) if one.source == name]
        images = sum(filter(None, (num_images(one) for one in removed)))
        size = in_words(sum(one.num_bytes for one in removed))
        for one in removed:
            Ledger(checkout).untrack(one.tracked_by)
        for folder in folders:  # including leftovers of a killed ingest or removal
            shutil.rmtree(folder)
    summary = f"removed {name}: {len(removed)} snapshots, {images:,} images, {size}"
    Console(soft_wrap=True, highlight=False).print(f"{summary}; earlier runs keep what they used", markup=False)


def _row(name: str, parts: Sequence[Snapshot], found: Sequence[Snapshot]) -> Row:
    provenance = sorted((one.provenance for one in parts if one.provenance), key=lambda p: p.ingested_at)
    last = provenance[-1] if provenance else None
    return Row(
        source=name,
        taken_by=_taken_by(name, parts, found),
        training_images=_count([one for one in parts if one.collection == POOL]),
        evaluation_images=_count([one for one in parts if one.collection == EVALUATION]),
        bytes=sum(one.num_bytes for one in parts),
        snapshots=[str(one.folder.relative_to(Path.cwd())) for one in parts],
        licenses=sorted({license_ for one in parts for license_ in _licenses(one)}),
        from_=sorted({one.source for one in provenance}),
        ingested_at=last.ingested_at.isoformat() if last else None,
        ingested_by=last.ingested_by if last else None,
    )


def _taken_by(name: str, parts: Sequence[Snapshot], found: Sequence[Snapshot]) -> str:
    stay = {one.source for one in found if one.collection == POOL and not one.one_run}
    if all(one.one_run for one in parts):
        return "its own run"
    if name == SAMPLE and stay != {SAMPLE}:
        return "no run, while there are others"
    return "every run"


def _count(parts: Sequence[Snapshot]) -> int | None:
    counts = [num_images(one) for one in parts]
    return None if None in counts else sum(filter(None, counts))


def _licenses(one: Snapshot) -> list[str]:
    import pyarrow.parquet as pq

    manifest = one.folder / "manifest.parquet"
    return pq.read_table(manifest, columns=["license"])["license"].unique().to_pylist() if manifest.is_file() else []


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("source", "taken by", "training", "evaluation", "size", "license", "ingested", "by", "from"):
        table.add_column(column, overflow="fold", no_wrap=column == "source")
    for row in rows:
        counts = ("?" if count is None else f"{count:,}" for count in (row.training_images, row.evaluation_images))
        when = (row.ingested_at or "-")[:16].replace("T", " ")
        origin = ", ".join(row.from_) or "-"
        licenses = ", ".join(row.licenses) or "?"
        table.add_row(
            row.source, row.taken_by, *counts, in_words(row.bytes), licenses, when, row.ingested_by or "-", origin
        )
    return table
