"""What all documents of a model state, read from the tree that `lineage.trace` builds and from the model's record.

Nothing depends on when a document is made: the same model gives the same bytes. Names of people, absolute paths and
logins of addresses are left out, because documents are given away.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from components.core.git import try_git
from components.core.layout import RELATIVE
from components.core.references import ModelReference
from components.lineage.code import STAGE as CODE_STAGE
from components.lineage.lock_file import RecordError
from components.lineage.runs import StageEnd, stage_ends
from components.lineage.trace_tree import Node
from components.registry.facts import Facts
from components.registry.making import Making

PREFIX = "urn:pedigree:"  # of names in documents that need URIs
LOCAL = "local:"  # in place of the folders of an absolute path

_FOLDERS = re.compile(r"""(?<![^\s='"(,\[])[~/](?:[^\s'",)\]]*/)?(?=[^/\s'",)\]])""")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


@dataclass(frozen=True)
class Data:
    """One version of a data folder.

    Attributes:
        path: in the repository.
        dvc: its DVC id.
        sha256: of its manifest, which has the SHA-256 of every image.
        images: (source, license, number of images).
        ingested: when it was taken in; None for the curated set, and where that was not recorded.
        address: where it was taken from; None likewise.
    """

    path: str
    dvc: str
    sha256: str | None
    images: tuple[tuple[str, str, int], ...]
    ingested: str | None = None
    address: str | None = None

    @property
    def num_images(self) -> int:
        """Number of its images."""
        return sum(count for _, _, count in self.images)

    @property
    def licenses(self) -> list[str]:
        """Licenses of its images."""
        return sorted({license_ for _, license_, _ in self.images})


@dataclass(frozen=True)
class Step:
    """One stage that led to the weights, with DVC ids by path; `ended` is None where its run does not say when."""

    name: str
    command: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    ended: datetime.datetime | None
    seconds: int | None

    @property
    def started(self) -> datetime.datetime | None:
        """When it began; None where it was not computed in this run."""
        known = self.ended is not None and self.seconds is not None
        return self.ended - datetime.timedelta(seconds=self.seconds or 0) if known and self.ended else None


@dataclass(frozen=True)
class Graph:
    """A model with all that it was made from.

    Attributes:
        name: of the model, without the suffix of candidates.
        parent: name and SHA-256 of the weights that it continues from or was taught by.
        steps: first to last.
        time: of the commit.
    """

    name: str
    making: Making
    facts: Facts
    parent: tuple[str, str]
    steps: tuple[Step, ...]
    curated: Data
    pool: tuple[Data, ...]
    time: datetime.datetime

    @property
    def data(self) -> tuple[Data, ...]:
        """The curated set and the snapshots of the pool."""
        return (self.curated, *self.pool)

    @property
    def weights(self) -> str:
        """Path of the weights file."""
        return f"{self.making.origin.weights_path}/model.safetensors"


def read_graph(name: str, tree: Node, making: Making, facts: Facts, root: Path) -> Graph:
    """Collect what the documents state.

    Args:
        name: of the registered model.
        tree: of `trace`, or of `workspace_tree`.
        making: recorded with the model.
        facts: recorded with the model.
        root: a clone that has the run's commits.

    Raises:
        RecordError: the commit is not in the clone, or its stages and data are not known.
    """
    origin = making.origin
    time = try_git(root, "show", "-s", "--format=%ct", origin.commit)
    if time is None:
        raise RecordError(f"commit {origin.commit}: not in the git repository here; fetch the branch of its run")
    ends = stage_ends(root, origin.commit)
    commit = _commit(tree)
    nodes = [child for child in commit.children if child.kind == "stage" and child.name != CODE_STAGE]
    folders = [child for child in commit.children if child.facts.get("dvc")]
    known = {child.facts["dvc"]: child for child in reversed(folders) if child.children}
    data = {child.name: _data(child, known.get(child.facts["dvc"], child)) for child in folders}
    curated = data.pop(str(RELATIVE.curated), None)
    if not nodes or curated is None or not curated.images:
        why = next((line for node in commit.walk() for line in node.missing), "its stages are not recorded")
        raise RecordError(f"commit {origin.commit[:12]}: stages or training set are not known: {why}")
    return Graph(
        name=ModelReference(name).model,
        making=making,
        facts=facts,
        parent=(public(making.parent[0]), making.parent[1]),
        steps=tuple(_step(node, ends.get(node.name)) for node in reversed(nodes)),
        curated=curated,
        pool=tuple(found for path, found in sorted(data.items()) if path.startswith(f"{RELATIVE.pool}/")),
        time=_utc(int(time)),
    )


def public(value: Any) -> Any:
    """Return a value without folders of absolute paths, and without logins and queries of addresses."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "file:")):
        return LOCAL + PurePosixPath(value).name
    return _FOLDERS.sub(LOCAL, _QUERY.sub(r"\1", _LOGIN.sub("", value)))


def _commit(tree: Node) -> Node:
    """The commit that made a version; a parent's own commit is none of it."""
    if tree.kind == "commit":
        return tree
    kinds = {child.kind: child for child in reversed(tree.children)}
    node = kinds.get("commit") or kinds.get("version")
    if node is None:
        raise RecordError(f"{tree.kind} {tree.name}: no commit is known that made it; see `pedigree trace`")
    return _commit(node)


def _step(node: Node, end: StageEnd | None) -> Step:
    inputs, outputs = (node.facts.get(key) or {} for key in ("deps", "outs"))
    return Step(
        name=node.name,
        command=public(node.facts.get("command") or ""),
        parameters=public(node.facts.get("params") or {}),
        inputs={path: dvc_id or "" for path, dvc_id in sorted(inputs.items())},
        outputs={path: dvc_id or "" for path, dvc_id in sorted(outputs.items())},
        ended=_utc(end.time) if end else None,
        seconds=end.seconds if end else None,
    )


def _data(node: Node, contents: Node) -> Data:
    """A data folder; `contents` is the node of the same bytes that has their details."""
    address = node.facts.get("source")
    return Data(
        path=node.name,
        dvc=node.facts["dvc"],
        sha256=contents.facts.get("manifest_sha256"),
        images=tuple(sorted(_images(contents))),
        ingested=node.facts.get("ingested_at"),
        address=public(address) if address else None,
    )


def _images(node: Node) -> Iterator[tuple[str, str, int]]:
    for child in node.children:
        if child.kind == "source":
            yield public(child.name), child.facts["license"], child.facts["images"]


def _utc(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
