"""`pedigree trace`: show what a model, a run or a commit was made from, and what data or an image went into."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from components.core.storage import write_bytes
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.lineage.trace_tree import Node

MAX_SHOWN = 8
MAX_ALIKE = 4  # nodes of one kind below a node, in the short tree
KIND_STYLES = {"version": "bold green", "event": "magenta", "commit": "bold yellow", "stage": "cyan", "source": "blue"}


@command(services=True)
def trace(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="NAME@ALIAS, NAME/NUMBER, a run id, a commit, a DVC id, an image id or an image file.",
        ),
    ],
    full: Annotated[bool, typer.Option("--full", help="The whole tree: parameters, hashes, S3 objects, code.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to click through instead.")] = None,
) -> Answer:
    """Show what a thing was made from, down to the S3 objects and the sources of its images.

    A registered model, a run or a commit leads to its stages and data. Data
    and images lead up too: to the runs and models that have them. Lists what
    is missing or contradictory, and exits with 1 if anything is.

    Examples:
      pedigree trace pedigree@champion

      pedigree trace pedigree-candidates@latest --full

      pedigree trace photo.jpg

      pedigree trace pedigree/3 --html trace.html

      pedigree trace pedigree/3 --json | jq '.. | objects | select(.kind == "source")'
    """
    from components.lineage.trace_targets import trace_target

    found = trace_target(target, Path.cwd())
    if html is not None:
        from components.lineage.trace_page import render_trace

        write_bytes(html, render_trace(found))
    problems = [f"  {line}" for line in found.missing]
    if problems:
        problems.insert(0, f"incomplete: {len(found.missing)} things are missing or contradict each other")
    return Answer(found.as_dict(), partial(_show, found.root, full, html), problems, exit_code=int(bool(problems)))


def _show(root: Node, full: bool, html: Path | None) -> None:
    console = answer_console()
    if html is not None:
        console.print(Text(f"written to {html}"))
    else:
        console.print(render(root) if full else brief(root), soft_wrap=False)


def brief(node: Node) -> Tree:
    """Render a node and its descendants as a tree that fits one screen."""
    from components.lineage.trace_tree import headline, shown_name

    label = Text.assemble((node.kind, "dim"), " ", (shown_name(node), KIND_STYLES.get(node.kind, "bold")))
    tree = Tree(label.append(f"  {line}", "default") if (line := headline(node)) else label)
    for line in node.missing:
        tree.add(Text(f"missing: {line}", "red"))
    plain = [child for child in node.children if child.kind == "stage" and not child.children]
    if plain:
        tree.add(Text.assemble(("stages ", "dim"), (", ".join(reversed([one.name for one in plain])), "cyan")))
    if sources := [f"{s.name} {headline(s)}" for s in node.children if s.kind == "source"]:
        tree.add(Text.assemble(("sources ", "dim"), ("; ".join(sources[:MAX_ALIKE]), "blue")))
        if len(sources) > MAX_ALIKE:
            tree.add(Text(f"{len(sources) - MAX_ALIKE} more sources; --full shows all", "dim"))
    _add_children(tree, [c for c in node.children if c not in plain and c.kind not in {"source", "code"}])
    return tree


def _add_children(tree: Tree, children: list[Node]) -> None:
    counts: dict[str, int] = {}
    for child in children:
        counts[child.kind] = counts.get(child.kind, 0) + 1
        if counts[child.kind] <= MAX_ALIKE:
            tree.add(brief(child))
    for kind, count in counts.items():
        if count > MAX_ALIKE:
            tree.add(Text(f"{count - MAX_ALIKE} more of kind {kind}; --full shows all", "dim"))


def render(node: Node) -> Tree:
    """Render a node and its descendants as a tree; long lists are truncated (`--json` has all)."""
    tree = Tree(Text.assemble((node.kind, "dim"), " ", (node.name, KIND_STYLES.get(node.kind, "bold"))))
    for key, value in node.facts.items():
        if value not in (None, {}, []):
            _add_fact(tree, key, value)
    for line in node.missing:
        tree.add(Text(f"missing: {line}", "red"))
    for child in node.children:
        tree.add(render(child))
    return tree


def _add_fact(tree: Tree, key: str, value: Any) -> None:
    label = Text(f"{key}: ", "dim")
    if not isinstance(value, dict):
        tree.add(label + Text(", ".join(value) if isinstance(value, list) else str(value), "default"))
        return
    branch = tree.add(label + Text(f"{len(value)}", "default"))
    for number, (name, item) in enumerate(value.items()):
        if number == MAX_SHOWN:
            branch.add(Text(f"and {len(value) - MAX_SHOWN} more", "dim"))
            break
        branch.add(Text(f"{name}  {item}", "default"))
