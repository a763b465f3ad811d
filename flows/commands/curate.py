"""`pedigree curate --explain`: explain why an image is in the curated set of a run or out of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from components.core.git import try_git
from components.core.layout import RELATIVE, Layout
from components.core.text import one_line
from flows.commands.decorators import Answer, command
from flows.git import WorkspaceError

if TYPE_CHECKING:
    from components.curation.explain import CuratedTables, Explanation, Mention

CURATED = str(RELATIVE.curated)
TABLES = ("manifest.parquet", "rejected.parquet")
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
    run: Annotated[str | None, typer.Option(help="Id of a run; default: the newest that curated.")] = None,
) -> Answer:
    """Explain why an image is in a run's curated set or out of it: reason, duplicate, similarity, scores, cluster.

    Examples:
      pedigree curate --explain 3f9a21c0

      pedigree curate --explain beach.jpg --run 20261124-061145-0635

      pedigree curate --explain 3f9a21c0 --json | jq .other
    """
    from components.curation.explain import explain

    name, tables = find_tables(Path.cwd(), run)
    found = explain(tables, image)
    data = {"run": name, "manifest": str(tables.manifest), **found.as_dict()}
    return Answer(data, partial(_show, found, name, tables))


def _show(found: Explanation, name: str, tables: CuratedTables) -> None:
    console = Console(soft_wrap=True, highlight=False)
    verdict = Text("in" if found.kept else "out", "bold green" if found.kept else "bold red")
    console.print(Text.assemble(verdict, f": {found.meaning}"))
    console.print(_lines(found, name, tables), markup=False)


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


def _lines(found: Explanation, run: str, tables: CuratedTables) -> str:
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
        ("run", run),
        ("read from", str(tables.manifest.parent)),
    ]
    lines = [f"{label:<{LABEL}}{line}" for label, value in rows if value for line in str(value).splitlines()]
    return "\n".join(lines)


def _mention(other: Mention) -> str:
    uri = f" {other.source}: {one_line(other.source_uri, MAX_URI)}" if other.source_uri else ""
    return f"{other.image_id[:16]} ({other.where}){uri}"
