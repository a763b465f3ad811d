"""The tree of a trace: what a thing was made from, with what should be known and is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "pedigree-trace/1"  # described by trace.schema.json
KINDS = (
    "version", "event", "run", "parent", "embedder", "commit", "stage", "code", "curated", "pool", "evaluation",
    "source", "pipeline", "image",
)  # fmt: skip
ABOVE = "above"  # fact of a node whose details stand at an earlier node of the same name


@dataclass
class Node:
    """One thing of the trace.

    Attributes:
        kind: one of `KINDS`.
        name: what a person calls it.
        facts: what is known of it.
        children: what it was made from.
        missing: what should be known of it and is not, or contradicts something else.
    """

    kind: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Trace:
    """The tree that explains one version."""

    reference: str
    root: Node

    @property
    def missing(self) -> list[str]:
        """All that could not be found, with the node it belongs to."""
        return [f"{node.kind} {node.name}: {line}" for node in self.root.walk() for line in node.missing]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `complete` says whether nothing is missing."""
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "complete": not self.missing,
            "missing": self.missing,
            "trace": self.root.as_dict(),
        }


def headline(node: Node) -> str:
    """Return the facts of a node that a person asks for first, in one line; empty where its name says all."""
    make = _HEADLINES.get(node.kind)
    return ", ".join(part for part in make(node.facts, node) if part) if make else ""


def shown_name(node: Node) -> str:
    """Return a node's name, with commits and image ids cut."""
    return node.name[:12] if node.kind in {"commit", "image"} else node.name


def _version(facts: dict[str, Any], _: Node) -> list[str]:
    parts = [*facts.get("aliases", ()), *facts.get("relation", ())]
    parts += [f"learned from {teacher}" for teacher in facts.get("learned_from", ())]
    parts += [f"{weights} {told}" for weights, told in facts.get("draws", {}).items()]
    created = facts.get("created")
    return [*parts, f"created {created[:10]}" if created else "", "as above" if facts.get(ABOVE) else ""]


def _data(facts: dict[str, Any], node: Node) -> list[str]:
    sources = [child.facts for child in node.children if child.kind == "source"]
    images = sum(source["images"] for source in sources)
    parts = [str(facts.get("dvc") or "")[:12], f"{images:,} images" if sources else ""]
    parts += [f"ingested {facts['ingested_at'][:10]} by {facts['ingested_by']}" if "ingested_by" in facts else ""]
    if "in" in facts:
        parts += [f"{'in' if facts['in'] else 'out'}: {facts['reason']}", facts["source_uri"]]
        parts += [f"{len(facts['runs'])} runs" if facts.get("runs") else ""]
    return [*parts, "as above" if facts.get(ABOVE) else ""]


def _event(facts: dict[str, Any], _: Node) -> list[str]:
    return [str(facts.get("time", ""))[:10], f"{facts.get('actor', '')}: {facts.get('reason', '')}"]


def _run(facts: dict[str, Any], _: Node) -> list[str]:
    return [str(facts.get(key) or "") for key in ("name", "status", "user")] + [str(facts.get("started") or "")[:10]]


def _commit(facts: dict[str, Any], _: Node) -> list[str]:
    author = str(facts.get("author", "")).partition(" <")[0]
    return [facts.get("branch", ""), facts.get("subject", ""), author, str(facts.get("date", ""))[:10]]


_HEADLINES: dict[str, Callable[[dict[str, Any], Node], list[str]]] = {
    "version": _version,
    "event": _event,
    "run": _run,
    "parent": lambda facts, _: [f"weights {facts['weights_sha256'][:12]}" if facts.get("weights_sha256") else ""],
    "embedder": lambda facts, _: [facts.get("role", "")],
    "commit": _commit,
    "stage": lambda facts, _: [facts.get("command") or ""],
    "source": lambda facts, _: [facts.get("license") or "", f"{facts.get('images', 0):,} images"],
    "pipeline": lambda facts, _: [facts.get("state", ""), facts.get("branch", "")],
    **dict.fromkeys(("curated", "pool", "evaluation"), _data),
}
