"""The page of a trace: one HTML file without network, whose tree opens node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.core.page import render
from components.lineage.trace_tree import Node, Trace, headline, shown_name

OPEN_LEVELS = 3  # of the tree, when the page is opened


@dataclass(frozen=True)
class Shown:
    """A node as the page shows it."""

    kind: str
    name: str
    line: str
    missing: list[str]
    lost: int  # missing lines of the node and all below it
    facts: list[tuple[str, str | list[tuple[str, str]]]]
    children: list[Shown]
    open: bool


def render_trace(found: Trace) -> bytes:
    """Render the page; equal traces give equal bytes."""
    return render(
        "components/lineage/trace.html",
        title=f"Trace of {found.reference}",
        missing=found.missing,
        root=_shown(found.root, 0),
        nodes=sum(1 for _ in found.root.walk()),
    )


def _shown(node: Node, level: int) -> Shown:
    return Shown(
        kind=node.kind,
        name=shown_name(node),
        line=headline(node),
        missing=node.missing,
        lost=sum(len(one.missing) for one in node.walk()),
        facts=[(node.kind, node.name), *((key, _value(v)) for key, v in node.facts.items() if v not in (None, {}, []))],
        children=[_shown(child, level + 1) for child in node.children],
        open=level < OPEN_LEVELS,
    )


def _value(value: Any) -> str | list[tuple[str, str]]:
    if isinstance(value, dict):
        return [(str(name), str(item)) for name, item in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
