"""`pedigree ingest`: add a source of images to the pool."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from components.core.config import ConfigError
from flows.commands.decorators import Answer, command
from flows.commands.starting import connect, finished
from flows.console import shown
from flows.git import head_commit

if TYPE_CHECKING:
    from flows.ingest import Ingested


@command()
def ingest(  # noqa: PLR0913, PLR0917 - the options of a command
    source: Annotated[str, typer.Argument(help="Folder, s3://bucket/prefix, tar shards or Parquet with image bytes.")],
    name: Annotated[str, typer.Option(help="Name of the source in the pool: small letters, digits, hyphens.")],
    license_: Annotated[str, typer.Option("--license", help="License under which the images may be used.")],
    holdout: Annotated[float | None, typer.Option(help="Share held out for evaluation, such as 0.2.")] = None,
    evaluation: Annotated[bool, typer.Option(help="The whole source is an evaluation set.")] = False,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image that is decoded; default 50 million.")] = None,
    retrain: Annotated[bool, typer.Option(help="Let new images start a retraining.")] = True,
    quiet: Annotated[bool, typer.Option(help="Show only warnings, errors and the result.")] = False,
) -> Answer:
    """Add a source of images to the pool: decode, validate, store, track with DVC, push to S3.

    Images that the pool has are not stored again. New images start a full retraining by the deployment
    `retrain/on-new-images`, whose run is named at the end; `--no-retrain` prevents it.

    Examples:
      pedigree ingest ~/photos --name photos --license CC-BY-4.0 --holdout 0.2

      pedigree ingest ~/photos --name photos --license CC-BY-4.0 --no-retrain

      pedigree ingest s3://bucket/shards/ --name crawl --license CC0-1.0
    """
    checkout = Path.cwd()
    with shown(quiet, said_at_end="components.data.ingest"):
        from components.data.ingest_config import IngestRequest

        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        request = IngestRequest.parse(
            source=source, name=name, license=license_, holdout=holdout, as_evaluation=evaluation, **limit
        )
        if "://" not in source and not Path(source).exists():
            raise ConfigError(f"{source}: no such file or folder; give a folder of images, tar shards or Parquet")
        head_commit(checkout)
        connect(checkout)
        from flows.ingest import ingest as flow

        done = finished(flow, request, announce=retrain)
    return Answer(_as_dict(done), partial(_show, done, name, retrain))


def _as_dict(done: Ingested) -> dict[str, Any]:
    report = done.report
    fields = ("seen", "stored", "held_out", "already_present", "rejected", "bytes_stored", "source_version")
    fields += ("ignored", "labels", "unlabeled")
    snapshots = {key: str(getattr(report, key) or "") or None for key in ("pool_snapshot", "evaluation_snapshot")}
    started = [asdict(each) for each in done.retraining]
    found = {key: getattr(report, key) for key in fields}
    return {**found, "notes": report.notes, **snapshots, "retraining": started}


def _show(done: Ingested, name: str, retrain: bool) -> None:
    console, report = Console(), done.report
    for line in (f"{name}: {report}", *(f"  {note}" for note in report.notes)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for folder in (report.pool_snapshot, report.evaluation_snapshot):
        if folder is not None:
            console.print(f"  {folder}: look at {folder}/summary.html; `git add {folder}.*` keeps it in your history")
    for line in done.retraining if retrain else ["no retraining starts, now or by a later ingest (--no-retrain)"]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
