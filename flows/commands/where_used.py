"""`pedigree where-used`: find the data versions, runs and models that an image, a source or a license is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from components.core.text import one_line, some_of
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.lineage.where_used import Draw, ModelUse, Use, Uses

INCOMPLETE = 1
MAX_SHOWN = 4  # of each list on the terminal
MAX_ROWS = 100  # images of a data version in JSON
MAX_DRAWN = 20  # images whose draws are recomputed
KINDS = {"pool": "pool snapshots", "evaluation": "evaluation sets", "curated": "curated versions"}


@command(services=True)
def where_used(
    target: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE_FILE|IMAGE_ID|SOURCE|LICENSE|URI",
            help="An image file, an image id or its beginning, a source, a license, or an image's URI or file name.",
        ),
    ],
) -> Answer:
    """Find where an image is used, or all images of a source or license.

    Searches the data of all commits of all branches, and all registered
    versions: how the image came in, why each curated version has it or not,
    the runs, the models that were trained on it, and those that were taught
    by or started from them, with the first and last step that drew it. For a
    file that is in no data version, near copies by the embedder of the newest
    run are offered, with their similarity.

    Exits with 1 if a data version or a model could not be searched; a data
    version that is stored nowhere and that only earlier commits name is a note.

    Examples:
      pedigree where-used photo.jpg

      pedigree where-used 3f9a21c0

      pedigree where-used CC-BY-4.0 --json | jq '.models[].reference'
    """
    from components.curation.near_copies import checked_image, near_copies, newest_embedded
    from components.lineage.where_used import Search, draws

    root = Path.cwd()
    search = Search(root)
    uses = search.find(search.query(target))
    near = None
    if not uses.data and Path(target).is_file():
        image = checked_image(Path(target))
        near = near_copies(image, newest_embedded(root), root)
    drawn, unknown = draws(uses, root) if len(uses.image_ids) <= MAX_DRAWN else ({}, [])
    problems = [f"incomplete: {line}" for line in [*uses.unknown, *unknown]]
    data = _as_dict(uses, drawn, root) | {"unknown": [*uses.unknown, *unknown], "given_up": uses.given_up}
    data |= {"near_copies": asdict(near) if near else None}
    show = partial(_show, uses, drawn, root, near.lines() if near else [])
    return Answer(data, show, problems, INCOMPLETE if problems else 0)


def _as_dict(uses: Uses, drawn: Mapping[str, Sequence[Draw]], root: Path) -> dict[str, Any]:
    from components.lineage.where_used import brought

    return {
        "query": str(uses.query),
        "used": bool(uses.data),
        "searched": uses.searched,
        "image_ids": uses.image_ids[:MAX_ROWS],
        "images": len(uses.image_ids),
        "runs": uses.runs,
        "data": [
            {
                **use.data._asdict(),
                "kind": use.data.kind,
                "kept": len(use.kept),
                "left_out": len(use.left_out),
                "reasons": _reasons(use),
                "brought": brought(root, use) if use.data.kind != "curated" else {},
                "commits": list(use.commits),
                "branches": list(use.branches),
                "rows": use.rows.slice(0, MAX_ROWS).to_pylist(),
            }
            for use in uses.data
        ],
        "models": [{**vars(m), "data": [d._asdict() for d in m.data],
                    "drawn": [vars(draw) for draw in drawn.get(m.reference, [])]} for m in uses.models],
    }  # fmt: skip


def _reasons(use: Use) -> dict[str, int]:
    found = Counter(zip(use.rows["kept"].to_pylist(), use.rows["reason"].to_pylist(), strict=True))
    return {("in: " if kept else "out: ") + reason: count for (kept, reason), count in sorted(found.items())}


def _show(uses: Uses, drawn: Mapping[str, Sequence[Draw]], root: Path, more: Sequence[str]) -> None:
    console = answer_console()
    for line in (_sentence(uses), *more):
        console.print(Text(line))
    tree = Tree(Text(str(uses.query), "bold"))
    for kind, plural in KINDS.items():
        found = [use for use in uses.data if use.data.kind == kind]
        if found:
            _add(tree.add(Text(plural, "bold")), [_data_lines(use, root) for use in found])
    models = [model for model in uses.models if model.learned or "evaluated on it" in model.relations]
    if models:
        _add(
            tree.add(Text("models", "bold")), [_model_lines(model, drawn.get(model.reference, ())) for model in models]
        )
    if tree.children:
        console.print(tree, soft_wrap=False)
    for line in uses.given_up:
        console.print(Text(f"note: no branch or version has {line}"))


def _sentence(uses: Uses) -> str:
    if not uses.data:
        return f"{uses.query}: in none of {uses.searched} data versions"
    kept = {kind: sum(use.data.kind == kind and len(use.kept) > 0 for use in uses.data) for kind in KINDS}
    parts = [f"in {count} {KINDS[kind]}" for kind, count in kept.items()]
    trained = sum(model.learned for model in uses.models)
    return f"{uses.query}: {', '.join(parts)}; {len(uses.runs)} runs have it; {trained} models learned from it"


def _add(branch: Tree, items: Sequence[Sequence[Text]]) -> None:
    for first, *more in items[:MAX_SHOWN]:
        node = branch.add(first)
        for line in more:
            node.add(line)
    if len(items) > MAX_SHOWN:
        branch.add(Text(f"and {len(items) - MAX_SHOWN} more; --json lists all", "dim"))


def _data_lines(use: Use, root: Path) -> list[Text]:
    from components.lineage.where_used import brought

    name = use.data.path if use.data.kind != "curated" else use.data.dvc[:12]
    first = Text.assemble((name, "bold"), (f"  {use.data.dvc}" if use.data.kind != "curated" else "", "dim"))
    if use.runs:
        first.append(f"  {len(use.runs)} runs: {some_of(use.runs, 1)}", "dim")
    lines = [first, *_row_lines(use)]
    if use.data.kind != "curated" and (facts := brought(root, use)):
        lines.append(Text(f"ingested {facts['ingested_at'][:10]} by {facts['ingested_by']} from {facts['source']}"))
    return lines


def _row_lines(use: Use) -> Iterator[Text]:
    """Yield a line for each of a few images, else one for each reason."""
    if len(use.rows) > MAX_SHOWN:
        for reason, count in _reasons(use).items():
            yield Text(f"{count:,} {reason}", "green" if reason.startswith("in") else "red")
        return
    for row in use.rows.to_pylist():
        other = f" {row['other'][:12]} ({row['similarity']:.3f})" if row["other"] and row["similarity"] else ""
        license_ = f", {row['license']}" if row["license"] else ""
        place = f" · {row['source']}: {one_line(row['source_uri'], 60)}{license_}"
        state = Text("in: " if row["kept"] else "out: ", "green" if row["kept"] else "red")
        yield state + Text(f"{row['reason']}{other}", "default") + Text(place, "dim")


def _model_lines(model: ModelUse, drawn: Sequence[Draw]) -> list[Text]:
    aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
    relations = [name for name in model.relations if name != "in its pool"]
    relations += [f"learned from {teacher}" for teacher in model.teachers]
    lines = [Text.assemble((f"{model.reference}{aliases}", "bold"), f"  {', '.join(relations)}")]
    return [*lines, *(Text(_drawn(draw)) for draw in drawn[:MAX_SHOWN])]


def _drawn(draw: Draw) -> str:
    relation = "" if draw.relation == "itself" else f"{draw.relation} "
    if draw.first is None:
        return f"{relation}{draw.weights}: never drawn in {draw.of_steps:,} steps"
    steps = f"step {draw.first:,} to {draw.last:,}" if draw.draws > 1 else f"step {draw.first:,}"
    return f"{relation}{draw.weights}: drawn {draw.draws:,} times, {steps} of {draw.of_steps:,}"
