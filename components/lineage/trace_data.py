"""The part of a trace that a commit gives: stages, code and data, down to S3 objects and the sources of the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.core.errors import PedigreeError
from components.core.git import try_git
from components.core.layout import RELATIVE
from components.data.expectations import VALIDATION
from components.data.manifest import MANIFEST
from components.data.provenance import SUFFIX, Provenance
from components.data.summary import SUMMARY
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record, upstream
from components.lineage.provenance import CURATED, POOL, Tag, data_versions
from components.lineage.trace_tree import ABOVE, Node

DATA_FOLDERS = tuple(f"{folder}/" for folder in (RELATIVE.data, RELATIVE.models, RELATIVE.reports))


class DataTrace:
    """Contents of the data versions of a record.

    Args:
        record: of the commit.
        shown: DVC ids of data whose contents are in the tree already; receives those of this record.
    """

    def __init__(self, record: Record, shown: set[str]) -> None:
        self.record, self.shown = record, shown

    def add_provenance(self, node: Node) -> None:
        """Add who brought a snapshot, when and from where, as far as that was written down."""
        text = self.record.read(node.name + SUFFIX)
        try:
            node.facts |= {} if text is None else Provenance.model_validate_json(text).model_dump(mode="json")
        except ValidationError:
            node.missing.append(f"its {node.name}{SUFFIX} is not what ingest writes")

    def add_contents(self, node: Node) -> None:
        """What is in a data folder, from the DVC remote: its objects, its manifest, the sources of its images."""
        if node.facts["dvc"] in self.shown:
            node.facts[ABOVE] = True
            return
        self.shown.add(node.facts["dvc"])
        try:
            remote = Remote(self.record.remote_url())
            node.facts["listing"] = remote.address(node.facts["dvc"])
            files = remote.listing(node.facts["dvc"])
            node.facts["objects"] = {path: remote.address(md5) for path, md5 in sorted(files.items())}
            there = remote.versions(files.values())
            node.facts["object_versions"] = {p: there[md5] for p, md5 in sorted(files.items()) if md5 in there}
            lost = [(p, md5) for p, md5 in files.items() if md5 not in there]
            node.missing += [f"{remote.address(md5)} ({p}): no such object" for p, md5 in lost]
            if MANIFEST not in files:
                node.missing.append(f"has no {MANIFEST}")
                return
            self._add_validation(node, remote, files)
            manifest = remote.file(self.record.root / node.name, MANIFEST, files[MANIFEST])
        except (PedigreeError, ValueError, KeyError) as error:
            node.missing.append(str(error))
            return
        node.facts["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
        node.children += count_sources(manifest)

    def _add_validation(self, node: Node, remote: Remote, files: Mapping[str, str]) -> None:
        """Add where the results of Great Expectations are, and each check: all is written only for data that passed."""
        checks = None
        if node.kind == "curated":
            folder = RELATIVE.report("curate")
            if md5 := self.record.output(str(folder / "report.html")):
                node.facts["validation"] = f"passed all gates, see {folder / 'report.html'} (DVC {md5})"
            checks = self.record.read(str(folder / VALIDATION))
        elif SUMMARY in files:
            node.facts["validation"] = f"passed, see {SUMMARY} (DVC {files[SUMMARY]})"
            if VALIDATION in files:
                checks = remote.file(self.record.root / node.name, VALIDATION, files[VALIDATION])
        if checks is not None:
            node.facts["checks"] = {
                f"{one['of']}: {one['name']}": f"{one['meaning']}; {one['failing']} of {one['checked']} failed"
                for one in json.loads(checks)
            }


class LockTrace(DataTrace):
    """Stages, code and data of one `dvc.lock`, as far as they lead to one set of weights.

    Args:
        record: of the commit.
        tags: of the registered version of the weights, which the record must agree with; None: all of the record.
        shown: DVC ids of data whose contents are in the tree already; receives those of this record.
    """

    def __init__(self, record: Record, tags: dict[str, str] | None, shown: set[str]) -> None:
        super().__init__(record, shown)
        self.tags = tags
        self.stages = record.stages()
        self.path = (tags or {}).get(Tag.WEIGHTS_PATH, "")
        self.names = upstream(self.stages, self.path) if tags is not None else list(self.stages)

    def nodes(self) -> list[Node]:
        """Return the stages, the code that they ran, the curated set and the snapshots of the pool."""
        nodes = [_stage(name, self.stages[name]) for name in self.names]
        if not nodes:
            nodes = [Node("stage", self.path or "(none)", missing=["no stage in dvc.lock makes these weights"])]
        elif self.tags is not None and self.record.output(self.path) != self.tags.get(Tag.WEIGHTS_DVC):
            nodes[0].missing.append("dvc.lock records other weights than the registered ones")
        return [*nodes, self._code(), *self._data()]

    def _code(self) -> Node:
        deps = {d["path"]: d["md5"] for name in self.names for d in self.stages[name].get("deps", [])}
        code = {path: md5 for path, md5 in sorted(deps.items()) if not path.startswith(DATA_FOLDERS)}
        node = Node("code", f"{len(code)} paths", {"paths": code})
        gone = [p for p in code if try_git(self.record.root, "cat-file", "-e", f"{self.record.revision}:./{p}") is None]
        if gone:
            node.missing.append(f"not in the commit: {', '.join(gone)}")
        if not code:
            node.missing.append("no stage in dvc.lock names the code that it ran")
        return node

    def _data(self) -> list[Node]:
        stated = {v.path: v for tag in (Tag.CURATED, Tag.POOL) for v in data_versions(self.tags or {}, tag)}
        curated = self.record.output(CURATED)
        found = self.record.tracked(POOL)
        nodes = [Node("curated", CURATED, {"dvc": curated})] if curated or self.tags is not None else []
        nodes += [Node("pool", path, {"dvc": dvc_id}) for path, dvc_id in found.items()]
        nodes += [
            Node("pool", path, {"dvc": version.dvc}, missing=["the version names it, but its commit does not track it"])
            for path, version in stated.items()
            if path != CURATED and path not in found
        ]
        if not any(node.kind == "pool" for node in nodes):
            nodes.append(Node("pool", POOL, missing=["the commit tracks no snapshot of the pool"]))
        for node in nodes:
            version = stated.get(node.name)
            if node.kind == "pool":
                self.add_provenance(node)
            if self.tags is not None and (version is None or version.dvc != node.facts.get("dvc")):
                node.missing.append("not the version of this folder that the registered version names")
            if node.facts.get("dvc"):
                self.add_contents(node)
            if self.tags is not None and "manifest_sha256" in node.facts:
                stated_sha256 = version.manifest_sha256 if version else None
                if node.facts["manifest_sha256"] != stated_sha256:
                    node.missing.append(f"its manifest is not the one that was registered (SHA-256 {stated_sha256})")
        return nodes


class _InWorkspace(LockTrace):
    """Likewise, of a registration in progress: manifests are read from the workspace, and no storage is asked."""

    def add_contents(self, node: Node) -> None:
        """What is in a data folder: its manifest, the sources of its images."""
        manifest = self.record.root / node.name / MANIFEST
        if manifest.is_file():
            data = manifest.read_bytes()
            node.facts["manifest_sha256"] = hashlib.sha256(data).hexdigest()
            node.children += count_sources(data)


def workspace_tree(root: Path, tags: Mapping[str, str]) -> Node:
    """The commit that a version is about to be registered from, as a trace shows it but for the objects of its data.

    Args:
        root: the run's workspace.
        tags: of the version's origin.
    """
    node = Node("commit", tags[Tag.COMMIT], {"branch": tags[Tag.BRANCH]})
    node.children += _InWorkspace(Record(root), dict(tags), set()).nodes()
    return node


def count_sources(manifest: bytes) -> list[Node]:
    """Return the sources of the images of a manifest, with license and number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = ["source", "license"]
    table = pq.read_table(pa.BufferReader(manifest), columns=keys)
    rows = table.group_by(keys).aggregate([([], "count_all")]).to_pylist()
    rows.sort(key=lambda row: tuple(str(row[key]) for key in keys))
    return [Node("source", r["source"], {"license": r["license"], "images": r["count_all"]}) for r in rows]


def _stage(name: str, stage: dict[str, Any]) -> Node:
    facts = {
        "command": stage.get("cmd"),
        "params": {key: value for values in stage.get("params", {}).values() for key, value in values.items()},
        "deps": {dep["path"]: dep.get("md5") for dep in stage.get("deps", [])},
        "outs": {out["path"]: out.get("md5") for out in stage.get("outs", [])},
    }
    return Node("stage", name, facts)
