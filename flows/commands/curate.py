"""`pedigree curate --explain`: explain why an image is in the curated set of a run or out of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.git import try_git
from components.core.layout import RELATIVE, Layout
from components.core.references import RUN_ID
from components.core.storage import write_bytes
from components.core.text import one_line
from flows.asked_model import champion_of
from flows.commands.decorators import Answer, command
from flows.git import WorkspaceError
from infra.local import supervisor

if TYPE_CHECKING:
    from components.curation.explain import CuratedTables, Explanation, Mention

CURATED = str(RELATIVE.curated)
TABLES = ("manifest.parquet", "rejected.parquet")
NOT_FOUND = 1
MAX_SHOWN = 8
LABEL = 14  # characters
MAX_URI = 4096  # characters


@command(checkout=False)
def curate(
    image: Annotated[
        str,
        typer.Option(
            "--explain", metavar="IMAGE", help="Image id or its beginning, source URI, file name, or an image file."
        ),
    ],
    run: Annotated[str | None, typer.Option(help="Id of a run.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A registered model; default: the champion; without one, the newest run that curated."),
    ] = None,
) -> Answer:
    """Explain why an image is in a run's curated set or out of it: reason, duplicate, similarity, scores, cluster.

    Examples:
      pedigree curate --explain 3f9a21c0

      pedigree curate --explain beach.jpg --run 20261124-061145-0635

      pedigree curate --explain 3f9a21c0 --model pedigree/2

      pedigree curate --explain 3f9a21c0 --json | jq .other
    """
    from components.curation.explain import NoSuchImageError, explain

    root = Path.cwd()
    asked = find_asked(root, run, model)
    data = {"run": asked.run, "model": asked.model, "note": asked.note, "manifest": str(asked.tables.manifest)}
    try:
        found = explain(asked.tables, image)
    except NoSuchImageError as error:
        if not Path(image).is_file():
            raise
        lines = [f"asked: {asked}", *_near_copies(Path(image), asked, root)]
        return Answer(data | {"near_copies": lines[1:]}, partial(_print, lines), [f"error: {error}"], NOT_FOUND)
    return Answer({**data, **found.as_dict()}, partial(_show, found, asked))


@dataclass(frozen=True)
class Asked:
    """The curated set that an answer is about.

    Attributes:
        run: id of its run, or `this checkout`.
        tables: of the set.
        revision: of the run's record in git, if it has one.
        model: registered version that was trained on it, if asked for by it.
        note: why it is not the champion's, if nothing was asked for.
    """

    run: str
    tables: CuratedTables
    revision: str | None = None
    model: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        shown = f"{self.model}, run {self.run}" if self.model else f"run {self.run}"
        return f"{shown} ({self.note})" if self.note else shown


def find_asked(root: Path, run: str | None, model: str | None) -> Asked:
    """Find the curated set of a run or of a model; of the champion, or else of the newest run, if neither is given.

    Raises:
        ConfigError: both are given.
        WorkspaceError: as of `find_tables`.
        RecordError: there is no such model, or its record is not in this clone.
    """
    if run is not None and model is not None:
        raise ConfigError(f"--run {run} and --model {model}: give one of them")
    if model is not None:
        os.environ.update(supervisor.connect(root, start=False))
        return _of_model(root, model)
    note = None
    if run is None and (champion := champion_of(root)):
        try:
            os.environ.update(supervisor.connect(root, start=False))
            return _of_model(root, champion)
        except PedigreeError as error:  # no stack, no champion, or not all of its record here
            note = f"the newest that curated; not the champion: {str(error).splitlines()[0]}"
    name, tables = find_tables(root, run)
    return Asked(name, tables, try_git(root, "rev-parse", "--verify", "--quiet", f"runs/{name}"), note=note)


def _of_model(root: Path, reference: str) -> Asked:
    """Return the curated set of a registered version, from the DVC cache or remote."""
    from components.curation.explain import CuratedTables
    from components.lineage.image_index import Objects
    from components.lineage.seen import find_record_of

    version, record = find_record_of(reference, root)
    objects, dvc_id = Objects(root), record.output(CURATED)
    if dvc_id is None:
        raise WorkspaceError(f"{version}: its dvc.lock has no {CURATED}")
    files, folder = objects.listing(dvc_id), Layout(root).cache("tables") / dvc_id.removesuffix(".dir")
    for name in TABLES:
        if name not in files:
            raise WorkspaceError(f"{version}: its curated set has no {name}")
        if not (folder / name).is_file():
            write_bytes(folder / name, objects.read(files[name]))
    manifest, rejected = (folder / name for name in TABLES)
    tables = CuratedTables(manifest, rejected, Layout(root).evaluation)
    branches = try_git(root, "for-each-ref", "--format=%(refname)", "--contains", str(record.revision)) or ""
    run = next(iter(RUN_ID.findall(branches)), str(record.revision)[:12])
    return Asked(run, tables, record.revision, version)


def _near_copies(path: Path, asked: Asked, root: Path) -> list[str]:
    from components.curation.near_copies import checked_image, near_copies
    from components.lineage.lock_file import Record

    record = Record(root, asked.revision) if asked.revision else None
    return near_copies(checked_image(path), record, root).lines()


def _print(lines: Sequence[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line, markup=False)


def _show(found: Explanation, asked: Asked) -> None:
    console = Console(soft_wrap=True, highlight=False)
    verdict = Text("in" if found.kept else "out", "bold green" if found.kept else "bold red")
    console.print(Text.assemble(verdict, f": {found.meaning}"))
    console.print(_lines(found, asked), markup=False)


def find_tables(checkout: Path, run: str | None) -> tuple[str, CuratedTables]:
    """Return a run's name and its two tables, from its folder or, if that was removed, from the DVC cache.

    Args:
        checkout: Pedigree's folder.
        run: a run's id; None takes the newest run that has a curated set, or the checkout's own where no run has.

    Raises:
        WorkspaceError: no such run, or none whose curated set is on this machine.
    """
    if run is not None:
        if (tables := _tables_of_run(checkout, run)) is None:
            known = ", ".join(run_ids(checkout)[:MAX_SHOWN]) or "none"
            raise WorkspaceError(f"run {run}: no curated set of it is on this machine; runs: {known}")
        return run, tables
    for name in run_ids(checkout):
        if (tables := _tables_of_run(checkout, name)) is not None:
            return name, tables
    if (tables := _in_folder(checkout)) is not None:
        return "this checkout", tables
    raise WorkspaceError(f"{checkout}: no run here has a curated set yet; start one with `pedigree run`")


def run_ids(checkout: Path) -> list[str]:
    """Return the ids of this checkout's runs, newest first."""
    folders = {path.name for path in Layout(checkout).runs.glob("*/") if path.is_dir()}
    refs = try_git(checkout, "for-each-ref", "--format=%(refname:lstrip=3)", "refs/heads/runs") or ""
    return sorted(folders | set(refs.split()), reverse=True)


def _tables_of_run(checkout: Path, run: str) -> CuratedTables | None:
    return _in_folder(Layout(checkout).runs / run) or _in_cache(checkout, f"runs/{run}")


def _in_folder(root: Path) -> CuratedTables | None:
    from components.curation.explain import CuratedTables

    manifest, rejected = (root / CURATED / name for name in TABLES)
    if not (manifest.is_file() and rejected.is_file()):
        return None
    return CuratedTables(manifest, rejected, Layout(root).evaluation)


def _in_cache(checkout: Path, branch: str) -> CuratedTables | None:
    """Return the tables in DVC's cache, found by the `dvc.lock` of a run's branch."""
    from components.curation.explain import CuratedTables
    from components.lineage.stored import cached_files

    paths = cached_files(checkout, branch, CURATED)
    if not all(name in paths and paths[name].is_file() for name in TABLES):
        return None
    manifest, rejected = (paths[name] for name in TABLES)
    return CuratedTables(manifest, rejected, Layout(checkout).evaluation)


def _lines(found: Explanation, asked: Asked) -> str:
    relation = "retrieved by" if found.kept else "duplicates"
    similarity = "" if found.similarity is None else f", similarity {found.similarity:.4f}"
    scores = ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items())
    group = [_mention(other) for other in found.group[:MAX_SHOWN]]
    if len(found.group) > MAX_SHOWN:
        group.append(f"and {len(found.group) - MAX_SHOWN} more")
    rows: list[tuple[str, Any]] = [
        ("image", found.image_id),
        ("source", f"{found.source}: {one_line(found.source_uri, MAX_URI)}"),
        ("packed as", found.packed_as and f"{found.packed_as} (faces blurred)"),
        ("reason", found.reason + (f": {found.detail}" if found.detail else "")),
        (relation, found.other and _mention(found.other) + similarity),
        ("seed set", found.seed_set),
        ("cluster", found.cluster_path),
        ("scores", scores),
        ("same picture", "\n".join(group)),
        ("same bytes", "\n".join(one_line(name, MAX_URI) for name in found.listed_again)),
        ("model", asked.model),
        ("run", asked.run),
        ("chosen as", asked.note),
        ("read from", str(asked.tables.manifest.parent)),
    ]
    lines = [f"{label:<{LABEL}}{line}" for label, value in rows if value for line in str(value).splitlines()]
    return "\n".join(lines)


def _mention(other: Mention) -> str:
    uri = f" {other.source}: {one_line(other.source_uri, MAX_URI)}" if other.source_uri else ""
    return f"{other.image_id[:16]} ({other.where}){uri}"
