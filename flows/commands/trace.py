"""`pedigree trace`: show what a registered model was made from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.lineage.trace import Node

MAX_SHOWN = 8
KIND_STYLES = {"version": "bold green", "event": "magenta", "commit": "bold yellow", "stage": "cyan", "source": "blue"}


@command(services=True)
def trace(
    reference: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS|NAME/NUMBER", help="A released model or a candidate.")
    ],
) -> Answer:
    """Show what a registered model was made from, down to the S3 objects and the sources of its images.

    Lists what is missing or contradictory, and exits with 1 if anything is.

    Examples:
      pedigree trace pedigree@champion

      pedigree trace pedigree-candidates@latest

      pedigree trace pedigree/3 --json | jq '.. | objects | select(.kind == "source")'
    """
    from components.lineage import trace as tracing

    found = tracing.trace(reference, Path.cwd())
    problems = [f"  {line}" for line in found.missing]
    if problems:
        problems.insert(0, f"incomplete: {len(found.missing)} things are missing or contradict each other")
    return Answer(found.as_dict(), partial(_show, found.root), problems, exit_code=int(bool(problems)))


def _show(root: Node) -> None:
    answer_console().print(render(root), soft_wrap=False)


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
