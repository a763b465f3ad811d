"""`pedigree evalset`: add, list and check evaluation sets."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from components.core.config import ConfigError
from components.core.layout import RELATIVE
from flows.commands.decorators import Answer, answer_console, command
from flows.commands.starting import connect, finished
from flows.console import shown
from flows.git import head_commit
from flows.sources import EVALUATION, snapshots

if TYPE_CHECKING:
    from components.data.evalset_add import Added
    from components.data.evalset_config import EvalsetRequest

SAID = "components.data.ingest"  # its lines are repeated by the answer


@dataclass(frozen=True)
class Row:
    """One displayed set; None where its data is not in this checkout."""

    name: str
    version: str
    task: str | None
    metric: str | None
    images: dict[str, int] | None  # split -> images
    classes: int | None
    groups: list[str] | None
    license: str | None
    snapshot: str


@command(checkout=False)
def sample(
    out: Annotated[Path, typer.Option(help="Folder, which must not exist.")],
    seed: Annotated[int, typer.Option(help="Of the choice of tiles, materials and light.")] = 0,
) -> Answer:
    """Write the sample's four sets, one of each task, as folders that `add` takes.

    They are made from regions of the sample's photographs that its pool never
    has: test tiles under other light, mixed materials with exact masks, a
    stereo pair's depth, and crops to be found again.

    Examples:
      pedigree evalset sample --out ~/sets
      pedigree evalset add ~/sets/segmentation --name materials
    """
    from components.data.sample_sets import build_sample_sets

    if out.exists():
        raise ConfigError(f"{out}: is there already; remove it, or name another folder by --out")
    with shown(quiet=False):
        build_sample_sets(out, seed)
    folders = sorted(str(path) for path in out.iterdir() if path.is_dir())
    return Answer({"folders": folders}, partial(answer_console().print, "\n".join(folders), markup=False))


@command()
def add(
    folder: Annotated[Path, typer.Argument(help="Folder with evalset.yaml, images/ and what the task needs.")],
    name: Annotated[str, typer.Option(help="Name of the set: small letters, digits, hyphens.")],
    license_: Annotated[
        str | None, typer.Option("--license", help="License of images and targets; default: of evalset.yaml.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of other versions of the set.")] = False,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image that is decoded; default 50 million.")] = None,
    quiet: Annotated[bool, typer.Option(help="Show only warnings, errors and the result.")] = False,
) -> Answer:
    """Add an evaluation set from a folder: check all of it, store it, track it with DVC, push it to S3.

    The folder holds evalset.yaml and images/train, images/test; below these a
    folder for each class (classification), or targets/ with the names of the
    images and .png or .npy (segmentation, depth). Retrieval has queries.csv with
    the columns query,image,relation (easy, hard, junk), and needs no splits.
    groups.csv (image and one column each) names slices for any task.

    Video has a folder for each clip below its class, with its frames as images.

    evalset.yaml says task (classification, segmentation, depth, retrieval, video) and
    license; for segmentation classes (pixel value: name) and ignore (a value), for
    depth depth_range (nearest and farthest meters); for test images of the classes of
    another set, such as ImageNet-A, train_set (its name), and mapping (label: class
    of that set) where names differ; and where wanted metric (that
    decides), resolution (pixels a side), groups (columns of groups.csv) and clusters
    (the one of these that says which images are parts of one photograph).

    Examples:
      pedigree evalset add ~/sets/leaves --name leaves --license CC-BY-4.0

      pedigree evalset add ~/sets/streets --name streets --replace --json
    """
    with shown(quiet, said_at_end=SAID):
        request = _request(folder, name, license_, max_pixels, replace=replace)
        head_commit(Path.cwd())
        connect(Path.cwd())
        from flows.evalset import add_evalset

        done = finished(add_evalset, request)
    return Answer(_as_dict(done), partial(_show_added, done))


@command()
def check(
    which: Annotated[str, typer.Argument(metavar="FOLDER|NAME", help="A folder before `add`, or an added set.")],
    license_: Annotated[str | None, typer.Option("--license", help="As for `add`.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image that is decoded; default 50 million.")] = None,
) -> Answer:
    """Name all faults of an evaluation set, each with count and example; exit code 2 if there are any.

    Works without the services, and writes nothing but Great Expectations' pages.

    Examples:
      pedigree evalset check ~/sets/leaves --license CC-BY-4.0

      pedigree evalset check leaves
    """
    added = RELATIVE.evaluation / which
    with shown(said_at_end=SAID):
        if "/" not in which and added.is_dir():
            return _check_added(which)
        if not Path(which).is_dir():
            known = ", ".join(sorted({one.source for one in snapshots(Path.cwd()) if one.collection == EVALUATION}))
            raise ConfigError(f"{which}: no such folder, and no evaluation set; known: {known or 'none'}")
        from components.data.evalset_add import check_folder

        found = check_folder(_request(Path(which), "checked", license_, max_pixels))
    return Answer({**_as_dict(found), "snapshot": None}, partial(_show_right, which, found))


@command()
def list_sets() -> Answer:
    """List the evaluation sets: task, images by split, classes, groups, license, version.

    Works without the services.

    Examples:
      pedigree evalset list

      pedigree evalset list --json | jq '.evalsets[] | select(.task == "depth") | .name'
    """
    tracked = {one.folder for one in snapshots(Path.cwd()) if one.collection == EVALUATION}
    here = {path.parent.absolute() for path in RELATIVE.evaluation.glob("[!.]*/[!.]*/manifest.parquet")}
    rows = [_row(folder, folder in here) for folder in sorted(tracked | here)]
    return Answer({"evalsets": [asdict(row) for row in rows]}, partial(_show, rows))


def _request(
    folder: Path, name: str, license_: str | None, max_pixels: int | None, *, replace: bool = False
) -> EvalsetRequest:
    from components.data.evalset_config import EvalsetRequest

    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    request = EvalsetRequest.parse(source=folder, name=name, license=license_, replace=replace, **limit)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give one with evalset.yaml and images/")
    return request


def _check_added(name: str) -> Answer:
    from components.data.evalset_check import check_set

    found = sorted(path.parent for path in (RELATIVE.evaluation / name).glob("[!.]*/manifest.parquet"))
    if not found:
        raise ConfigError(f"{name}: its data is not in this checkout; `dvc pull {RELATIVE.evaluation / name}/*.dvc`")
    reports = {folder: check_set(folder, RELATIVE.data_docs) for folder in found}
    rows = [
        {"snapshot": str(folder), "images": one.rows, "checks": len(one.checks), "docs": str(one.docs)}
        for folder, one in reports.items()
    ]
    lines = [f"{row['snapshot']}: right; {row['images']} images, {row['checks']} checks: {row['docs']}" for row in rows]
    return Answer({"checked": rows}, partial(_print, lines))


def _row(folder: Path, here: bool) -> Row:
    name, shown_as = folder.parent.name, str(folder.relative_to(Path.cwd()))
    if not here:
        return Row(name, folder.name, None, None, None, None, None, None, shown_as)
    from components.data.evalset import known_version, read_config
    from components.data.manifest import read_manifest

    config, table = read_config(folder), read_manifest(folder / "manifest.parquet")
    splits = Counter(split or "none" for split in table["split"].to_pylist())
    labels = set(table["label"].to_pylist()) - {None}
    return Row(
        name=name,
        version=known_version(folder),
        task=config.task,
        metric=config.metric,
        images=dict(sorted(splits.items(), reverse=True)),
        classes=len(config.classes) or len(labels),
        groups=list(config.groups),
        license=config.license,
        snapshot=shown_as,
    )


def _show(rows: list[Row]) -> None:
    if not rows:
        _print(["no evaluation sets; `pedigree evalset add FOLDER --name NAME` adds one"])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("set", "version", "task", "images", "classes", "groups", "decides", "license"):
        table.add_column(column, overflow="fold", no_wrap=column in {"set", "version"})
    for row in rows:
        if row.images is None:
            table.add_row(row.name, row.version, f"data not here: `dvc pull {row.snapshot}.dvc`")
            continue
        images = ", ".join(f"{count:,} {split}" for split, count in row.images.items())
        groups = ", ".join(row.groups or ()) or "-"
        table.add_row(row.name, row.version, row.task, images, str(row.classes or "-"), groups, row.metric, row.license)
    answer_console().print(table, soft_wrap=False)


def _as_dict(done: Added) -> dict[str, Any]:
    return {
        "snapshot": str(done.snapshot),
        "version": done.version,
        "new": done.new,
        **done.config.model_dump(mode="json"),
        "images": done.images,
        "images_by_class": done.classes,
        "rows": done.rows,
        "notes": [*done.notes, *done.ingested.notes],
    }


def _show_added(done: Added) -> None:
    known = "" if done.new else " (this version was there already)"
    lines = [f"{done.snapshot.parent.name}: {done}{known}", *_notes(done)]
    _print([*lines, f"  {done.snapshot}: look at {done.snapshot}/summary.html; `git add {done.snapshot}.*` keeps it"])


def _show_right(which: str, found: Added) -> None:
    _print([f"{which}: right; {found}", *_notes(found)])


def _notes(done: Added) -> list[str]:
    return [f"  {note}" for note in (*done.notes, *done.ingested.notes)]


def _print(lines: list[str]) -> None:
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
