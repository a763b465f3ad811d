"""The trace of a registered model: version, decision, run, commit, stages, data, sources; and what could not be found.

Nothing is taken from memory of this machine: MLflow, the audit bucket, git objects and the DVC remote are asked. What
they do not have, or where they contradict each other, becomes a `missing` line of the node that needed it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.git import try_git
from components.core.layout import RELATIVE
from components.core.mlflow_client import checked_client, server_uri, shown_server
from components.core.references import URI, ModelReference
from components.core.storage import StorageError
from components.data.provenance import SUFFIX, Provenance
from components.lineage.audit_log import AuditLog, Entry
from components.lineage.champions import unexplained
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record, RecordError, find_record, upstream
from components.lineage.provenance import CURATED, POOL, Tag, data_versions

ACCEPTED = "accept-code"  # the action of an event by which a stage's outputs stand for other code than made them
DATA_FOLDERS = tuple(f"{folder}/" for folder in (RELATIVE.data, RELATIVE.models, RELATIVE.reports))


@dataclass
class Node:
    """One thing of the trace.

    Attributes:
        kind: version, event, run, parent, commit, stage, curated, pool, source or code.
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
            "reference": self.reference,
            "complete": not self.missing,
            "missing": self.missing,
            "trace": self.root.as_dict(),
        }


def trace(reference: str, root: Path) -> Trace:
    """Find out what a registered version was made from.

    Args:
        reference: `NAME@alias` or `NAME/number`, of released models or candidates.
        root: a clone of the repository whose commits made the model.

    Raises:
        ConfigError: what is no reference.
        RecordError: MLFLOW_TRACKING_URI is not set, or there is no such version.
        TrackingError: MLflow does not answer.
    """
    return Trace(reference, _Tracer(root).version_node(find_version(reference, root)))


def find_version(reference: str, root: Path) -> Any:
    """The MLflow version of `NAME@alias` or `NAME/number`.

    Raises:
        RecordError: as for `trace`.
    """
    asked = ModelReference.parse(reference.removeprefix(URI))
    if asked is None:
        raise ConfigError(f"{reference!r}: not a model; write NAME@ALIAS (such as pedigree@champion) or NAME/NUMBER")
    tracer = _Tracer(root)
    version = tracer.version(asked)
    if isinstance(version, str):
        reason = version.partition(": ")[2].rstrip(".") or version
        raise RecordError(f"{reference}: {reason}; the registry has {_found(lambda: tracer.known(asked.name))}")
    return version


class _Tracer:
    def __init__(self, root: Path) -> None:
        if server_uri() is None:
            raise RecordError("MLFLOW_TRACKING_URI is not set: the registry is on a server; run `pedigree up`")
        self.client = checked_client()
        self.root = root

    def version(self, asked: ModelReference) -> Any:
        """The MLflow version, or a sentence that says why there is none."""
        return _found(lambda: asked.find(self.client))

    def known(self, name: str) -> str:
        """Versions and aliases of the model; without such a model, the names of those that there are."""
        versions = self.client.search_model_versions(f"name='{name}'")
        if versions:
            numbers = ", ".join(sorted((str(version.version) for version in versions), key=int))
            aliases = ", ".join(sorted(self.client.get_registered_model(name).aliases))
            return f"{name} with the versions {numbers}" + (f" and the aliases {aliases}" if aliases else "")
        models = sorted(model.name for model in self.client.search_registered_models())
        return ", ".join(models) or "no models yet; `pedigree run` registers candidates"

    def version_node(self, version: Any) -> Node:
        tags = version.tags
        facts = {
            "aliases": self._aliases(version.name, version.version),
            "created": _utc(version.creation_timestamp),
            "digest": tags.get(Tag.DIGEST),
            "weights_sha256": tags.get(Tag.WEIGHTS_SHA256),
            "source": version.source,
            "validation": tags.get(Tag.VALIDATION),
        }
        node = _node("version", f"{version.name}/{version.version}", facts)
        if ModelReference(version.name).is_candidate:  # by its name: a tag can be taken away
            node.children += [self._run(version.run_id), *self._parent(tags), self._commit(tags)]
            return node
        node.children += self._events(node, version.name)
        node.children.append(self._candidate(tags))
        return node

    def _aliases(self, name: str, version: Any) -> list[str]:
        model = _found(lambda: self.client.get_registered_model(name))
        return [] if isinstance(model, str) else sorted(a for a, v in model.aliases.items() if str(v) == str(version))

    def _events(self, node: Node, name: str) -> list[Node]:
        """Audit events about a released version; what they say must agree with the registry."""
        try:
            entries = AuditLog.from_environment().read(name)
        except (RecordError, StorageError) as error:
            node.missing.append(str(error))
            return []
        model, versions = (
            _found(lambda: self.client.get_registered_model(name)),
            _found(lambda: list(self.client.search_model_versions(f"name='{name}'"))),
        )
        if isinstance(model, str) or isinstance(versions, str):
            node.missing.append("MLflow does not say which versions and aliases there are")
            return []
        told = unexplained(name, entries, model.aliases, versions)
        node.missing += [line.removeprefix(f"{node.name}: ") for line in told if _names(line, node.name)]
        return [_event(e) for e in entries if e.subject == node.name]

    def _candidate(self, tags: dict[str, str]) -> Node:
        reference = tags.get(Tag.CANDIDATE, "(none)")
        candidate = ModelReference.parse(reference)
        version = self.version(candidate) if candidate else "what the version names as its candidate is no version"
        if not isinstance(version, str):
            node = self.version_node(version)
            if node.facts.get("digest") != tags.get(Tag.DIGEST):
                node.missing.append("its digest is no longer the one that was promoted")
            return node
        # The released version carries its candidate's tags, so the trace goes on without one that was deleted.
        node = Node("version", reference, {"deleted": version}, missing=[] if candidate else [version])
        node.children += [*self._parent(tags), self._commit(tags)]
        return node

    def _run(self, run_id: str | None) -> Node:
        if not run_id:
            return Node("run", "(none)", missing=["the version names no MLflow run"])
        run = _found(lambda: self.client.get_run(run_id))
        if isinstance(run, str):
            return Node("run", run_id, missing=[run])
        info, tags = run.info, run.data.tags
        facts = {
            "name": info.run_name,
            "user": tags.get("mlflow.user"),
            "status": info.status,
            "started": _utc(info.start_time),
            "experiment_id": info.experiment_id,
            "pipeline_run": tags.get("pedigree.run"),
        }
        node = _node("run", run_id, facts)
        if info.lifecycle_stage != "active":
            node.missing.append("the run was deleted in MLflow")
        return node

    def _parent(self, tags: dict[str, str]) -> list[Node]:
        """The weights it started from or was taught by; of a registered teacher the bytes must be the same."""
        reference = tags.get(Tag.PARENT)
        if not reference:
            return [Node("parent", "(none)", missing=["the version names no parent"])]
        node = Node("parent", reference, {"weights_sha256": tags.get(Tag.PARENT_SHA256)})
        teacher = ModelReference.parse(reference)
        if teacher and not reference.startswith(f"{RELATIVE.models}/"):
            version = self.version(teacher)
            if isinstance(version, str):
                node.missing.append(version)
            elif version.tags.get(Tag.WEIGHTS_SHA256) != tags.get(Tag.PARENT_SHA256):
                node.missing.append("it has other weights in the registry now")
        return [node]

    def _commit(self, tags: dict[str, str]) -> Node:
        commit, branch = tags.get(Tag.COMMIT), tags.get(Tag.BRANCH, "")
        if not commit:
            return Node("commit", "(none)", missing=["the version names no git commit"])
        node = Node("commit", commit, {"branch": branch})
        shown = try_git(self.root, "show", "-s", "--format=%an <%ae>%n%aI%n%s", commit)
        if shown is None:
            node.missing.append(f"not in the git repository at {self.root}; fetch the branch {branch}")
            return node
        author, date, subject = [*shown.split("\n"), "", ""][:3]
        node.facts |= {"author": author, "date": date, "subject": subject}
        if tags.get(Tag.DIRTY) == "true":
            node.missing.append("the code had uncommitted changes when the version was registered")
        record = self._record(node, commit, tags.get(Tag.LOCK_SHA256))
        if record is not None:
            node.children += _LockTrace(record, tags).nodes()
            self._acceptances(node, record)
        return node

    def _acceptances(self, node: Node, record: Record) -> None:
        """Put below a stage the event by which a person took its outputs for code that did not make them."""
        name = (yaml.safe_load(record.read(str(RELATIVE.params)) or b"") or {}).get("name")
        try:
            events = [e for e in AuditLog.from_environment().read(name) if e.action == ACCEPTED] if name else []
        except (RecordError, StorageError) as error:
            node.missing.append(str(error))
            return
        for stage in (child for child in node.children if child.kind == "stage" and events):
            entry = record.stages().get(stage.name, {})
            code = {dep.get("md5") for dep in entry.get("deps", [])}
            for event in events:
                told = event.details
                if told["stage"] == stage.name and told["code"] in code and told["outputs"] == outputs_of(entry):
                    stage.children.append(_event(event))

    def _record(self, node: Node, commit: str, lock_sha256: str | None) -> Record | None:
        """The `dvc.lock` that the version was registered with: at its commit, or the one that its run made of it."""
        record = find_record(self.root, commit, lock_sha256)
        if record is not None:
            node.facts["record"] = record.revision
            return record
        node.missing.append(
            "neither it nor a commit after it has the dvc.lock of the registration; fetch all branches, "
            "or commit the dvc.lock of that run"
        )
        return None


def _names(line: str, version: str) -> bool:
    """Whether a line names the version, and not one whose number only begins alike."""
    return re.search(rf"{re.escape(version)}(?!\d)", line) is not None


class _LockTrace:
    """Stages, code and data of one `dvc.lock`, as far as they lead to one set of weights."""

    def __init__(self, record: Record, tags: dict[str, str]) -> None:
        self.record, self.tags = record, tags
        self.stages = record.stages()
        self.path = tags.get(Tag.WEIGHTS_PATH, "")
        self.names = upstream(self.stages, self.path)

    def nodes(self) -> list[Node]:
        nodes = [_stage(name, self.stages[name]) for name in self.names]
        if not nodes:
            nodes = [Node("stage", self.path or "(none)", missing=["no stage in dvc.lock makes these weights"])]
        elif self.record.output(self.path) != self.tags.get(Tag.WEIGHTS_DVC):
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
        stated = {v.path: v for tag in (Tag.CURATED, Tag.POOL) for v in data_versions(self.tags, tag)}
        curated = self.record.output(CURATED)
        found = self.record.tracked(POOL)
        nodes = [Node("curated", CURATED, {"dvc": curated})]
        nodes += [self._snapshot(path, dvc_id) for path, dvc_id in found.items()]
        nodes += [
            Node("pool", path, {"dvc": version.dvc}, missing=["the version names it, but its commit does not track it"])
            for path, version in stated.items()
            if path != CURATED and path not in found
        ]
        if not any(node.kind == "pool" for node in nodes):
            nodes.append(Node("pool", POOL, missing=["the commit tracks no snapshot of the pool"]))
        for node in nodes:
            version = stated.get(node.name)
            if version is None or version.dvc != node.facts.get("dvc"):
                node.missing.append("not the version of this folder that the registered version names")
            if node.facts.get("dvc"):
                self._contents(node, version.manifest_sha256 if version else None)
        return nodes

    def _snapshot(self, path: str, dvc_id: str) -> Node:
        """A snapshot of the pool, with who brought it, when and from where, as far as that was written down."""
        node = Node("pool", path, {"dvc": dvc_id})
        text = self.record.read(path + SUFFIX)
        try:
            brought = {} if text is None else Provenance.model_validate_json(text).model_dump(mode="json")
        except ValidationError:
            brought = {}
            node.missing.append(f"its {path}{SUFFIX} is not what ingest writes")
        node.facts |= brought
        return node

    def _contents(self, node: Node, stated_sha256: str | None) -> None:
        """What is in a data folder, from the DVC remote: its objects, its manifest, the sources of its images."""
        try:
            remote = Remote(self.record.remote_url())
            node.facts["listing"] = remote.address(node.facts["dvc"])
            files = remote.listing(node.facts["dvc"])
            node.facts["objects"] = {path: remote.address(md5) for path, md5 in sorted(files.items())}
            gone = set(remote.missing(files.values()))
            node.missing += [f"{remote.address(md5)} ({p}): no such object" for p, md5 in files.items() if md5 in gone]
            if "manifest.parquet" not in files:
                node.missing.append("has no manifest.parquet")
                return
            md5 = files["manifest.parquet"]
            manifest = remote.file(self.record.root / node.name, "manifest.parquet", md5)
        except (PedigreeError, ValueError, KeyError) as error:
            node.missing.append(str(error))
            return
        node.facts["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
        if node.facts["manifest_sha256"] != stated_sha256:
            node.missing.append(f"its manifest is not the one that was registered (SHA-256 {stated_sha256})")
        node.children += _sources(manifest)


class _InWorkspace(_LockTrace):
    """Likewise, of a registration in progress: manifests are read from the workspace, and no storage is asked."""

    def _contents(self, node: Node, stated_sha256: str | None) -> None:
        manifest = self.record.root / node.name / "manifest.parquet"
        if manifest.is_file():
            node.facts["manifest_sha256"] = stated_sha256
            node.children += _sources(manifest.read_bytes())


def workspace_tree(root: Path, tags: Mapping[str, str]) -> Node:
    """The commit that a version is about to be registered from, as `trace` shows it but for the objects of its data.

    Args:
        root: the run's workspace.
        tags: of the version's origin.
    """
    node = Node("commit", tags[Tag.COMMIT], {"branch": tags[Tag.BRANCH]})
    node.children += _InWorkspace(Record(root), dict(tags)).nodes()
    return node


def _sources(manifest: bytes) -> list[Node]:
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


def outputs_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """The DVC ids of the outputs of a stage's entry in `dvc.lock`, by path."""
    return {out["path"]: out["md5"] for out in entry.get("outs", [])}


def _event(entry: Entry) -> Node:
    facts = {"time": entry.time, "actor": entry.actor, **entry.details, "hash": entry.hash}
    return Node("event", f"{entry.action} {entry.sequence}", facts)


def _node(kind: str, name: str, facts: dict[str, Any]) -> Node:
    """A node all of whose facts should be known."""
    return Node(kind, name, facts, missing=[f"no {key}" for key, value in facts.items() if value is None])


def _found(ask: Any) -> Any:
    """What MLflow answers, or its refusal as one sentence."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        line = str(error).splitlines()[0]
        if "error code 403" in line:  # MLflow's answer about what is not there, to all but its admins
            return "not found, or not to be read by this user of MLflow"
        if "Max retries exceeded" in line or "API request to" in line:
            raise RecordError(f"{shown_server()} does not answer") from error
        return line
    except requests.exceptions.RequestException as error:
        raise RecordError(f"{shown_server()} does not answer") from error


def _utc(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).isoformat(timespec="seconds")
