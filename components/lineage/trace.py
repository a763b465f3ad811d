"""The trace of a registered model: version, decision, run, commit, stages, data, sources; and what could not be found.

Nothing is taken from memory of this machine: MLflow, the audit bucket, git objects and the DVC remote are asked. What
they do not have, or where they contradict each other, becomes a `missing` line of the node that needed it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.core.config import ConfigError
from components.core.git import try_git
from components.core.layout import RELATIVE
from components.core.mlflow_client import checked_client, server_uri, shown_server
from components.core.references import URI, ModelReference
from components.core.storage import StorageError
from components.lineage.audit_log import AuditLog, Entry
from components.lineage.champions import unexplained
from components.lineage.lock_file import Record, RecordError, find_record
from components.lineage.provenance import Tag
from components.lineage.trace_data import LockTrace
from components.lineage.trace_tree import ABOVE, Node, Trace
from components.lineage.verify_record import (
    Registration,
    RunRefs,
    branch_faults,
    decision_faults,
    registrations,
    run_refs,
    tag_faults,
)
from components.lineage.verify_runs import metric_faults

__all__ = ["ACCEPTED", "Node", "Trace", "find_version", "outputs_of", "trace"]

ACCEPTED = "accept-code"  # the action of an event by which a stage's outputs stand for other code than made them


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
        self._shown: set[str] = set()  # versions and data whose details are in the tree
        self._logs: dict[str, list[Entry] | None] = {}

    @cached_property
    def _refs(self) -> dict[str, RunRefs]:
        return run_refs(self.root)

    @cached_property
    def _registered(self) -> dict[str, Registration]:
        return registrations(self.root, self._refs)

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
        if node.name in self._shown:  # taught or embedded by itself: two versions of one family
            return Node("version", node.name, {ABOVE: True})
        self._shown.add(node.name)
        registration = self._registration(node, version)
        if ModelReference(version.name).is_candidate:  # by its name: a tag can be taken away
            node.children += [_event(entry) for entry in self._decisions(node, version.name)]
            node.children += [self._run(version.run_id, registration), self._commit(tags), *self._parent(tags)]
            return node
        node.children += self._events(node, version.name)
        node.children.append(self._candidate(tags))
        return node

    def _registration(self, node: Node, version: Any) -> Registration | None:
        """The record of the run that registered a version; where tags and branch contradict it is missing of the node.

        A version that is about to be registered has none yet.
        """
        entries = self._log(node, ModelReference(version.name).model)
        node.missing += decision_faults(version, entries) if entries is not None else []
        told = (e.details.get("candidate") for e in reversed(entries or ()) if e.subject == node.name)
        candidate = next(filter(None, told), version.tags.get(Tag.CANDIDATE, node.name))
        registration = self._registered.get(candidate)
        if registration:
            tags = registration.tags if Tag.COMMIT in registration.tags else version.tags
            node.missing += tag_faults(version, registration)
            node.missing += branch_faults(self.root, registration.run, self._refs.get(registration.run), tags)
        return registration

    def _aliases(self, name: str, version: Any) -> list[str]:
        model = _found(lambda: self.client.get_registered_model(name))
        return [] if isinstance(model, str) else sorted(a for a, v in model.aliases.items() if str(v) == str(version))

    def _log(self, node: Node, name: str) -> list[Entry] | None:
        """Audit events of a model, read once; None if they cannot be, which is missing of the node that asks first."""
        if name not in self._logs:
            self._logs[name] = None
            try:
                self._logs[name] = AuditLog.from_environment().read(name)
            except (RecordError, StorageError) as error:
                node.missing.append(str(error))
        return self._logs[name]

    def _decisions(self, node: Node, name: str) -> list[Entry]:
        """Decisions about a candidate, such as a rejection."""
        return [entry for entry in self._log(node, ModelReference(name).model) or () if entry.subject == node.name]

    def _events(self, node: Node, name: str) -> list[Node]:
        """Audit events about a released version; what they say must agree with the registry."""
        entries = self._log(node, name)
        if entries is None:
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

    def _run(self, run_id: str | None, registration: Registration | None) -> Node:
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
        if registration:
            node.missing += metric_faults(run, Record(self.root, registration.revision))
        elif info.lifecycle_stage != "active":
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
            else:
                node.children.append(self.version_node(version))
        return [node]

    def _embedders(self, record: Record) -> list[Node]:
        """The registered models by whose embeddings the training images were chosen, each with its own trace."""
        given = record.stages().get("embed", {}).get("params", {}).get(str(RELATIVE.params), {}).get("embed") or {}
        nodes = []
        for role in ("embedder", "semantic"):
            uri = (given.get(role) or {}).get("weights", "")
            if reference := ModelReference.of_uri(uri):
                node = Node("embedder", uri, {"role": role})
                version = self.version(reference)
                if isinstance(version, str):
                    node.missing.append(version)
                else:
                    node.children.append(self.version_node(version))
                nodes.append(node)
        return nodes

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
            node.children += LockTrace(record, tags, self._shown).nodes()
            self._acceptances(node, record)
            node.children += self._embedders(record)
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
