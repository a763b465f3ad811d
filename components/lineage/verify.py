"""Verify registered versions, and all that they were made from, from bytes: S3, MLflow, git and the audit log.

Each kind of check has a module of its own: `verify_record` (git and tags), `verify_model` (files of a version),
`verify_data` (DVC objects), `verify_runs` (MLflow's runs). Nothing is changed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from components.core.layout import RELATIVE, Layout
from components.core.mlflow_client import checked_client, reported, server_uri
from components.core.model_files import digest_of
from components.core.references import CANDIDATES, ModelReference
from components.core.storage import MissingInStorageError
from components.core.text import some_of
from components.lineage.audit_anchors import git_anchors, mlflow_anchors
from components.lineage.audit_chain import PURGE, REGISTER
from components.lineage.audit_log import PLATFORM, AuditLog, Entry
from components.lineage.audit_verify import verify_log
from components.lineage.champions import unexplained
from components.lineage.claims import mlflow_runs, versions
from components.lineage.lock_file import Record, RecordError
from components.lineage.provenance import WEIGHTS_FILE, Tag
from components.lineage.purge import PICTURES
from components.lineage.stored import object_path
from components.lineage.trace import find_version
from components.lineage.verify_data import DataCheck
from components.lineage.verify_model import NOT_IN_MLFLOW, model_faults, source_of
from components.lineage.verify_objects import NOT_THERE, Job, Memory, Objects, choose, run_jobs
from components.lineage.verify_record import (
    Registration,
    RunRefs,
    branch_faults,
    commit_faults,
    decision_faults,
    registrations,
    run_refs,
    tag_faults,
)
from components.lineage.verify_runs import PASSPORT, artifact_jobs, is_registration, metric_faults, same_stage

SAMPLE = 0.1  # of the bytes of shards
ALWAYS_BYTES = 1 << 30  # of shards that are read in any case
EVERYTHING = "everything"
GONE = f": {NOT_THERE}"  # end of the line on an object


@dataclass(frozen=True)
class Extent:
    """How much a check reads: a share of the bytes of shards; `anew` ignores what an interrupted check has read."""

    share: float = SAMPLE
    anew: bool = False


@dataclass
class Verification:
    """What a check has found.

    Attributes:
        target: what was asked for.
        versions: that were checked, with those that they came from.
        faults: one line each, with the path or address.
        notes: what was not checked.
        objects: how many were read.
        bytes: how many were read.
        remembered: objects that were read by a check that was interrupted.
        shards: how many there are, and how many were read.
        shard_bytes: likewise.
    """

    target: str
    versions: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    objects: int = 0
    bytes: int = 0
    remembered: int = 0
    shards: tuple[int, int] = (0, 0)
    shard_bytes: tuple[int, int] = (0, 0)

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.faults

    def summary(self) -> list[str]:
        """Return what was checked, how much of it was read, and the result, for a person."""
        (shards, read), (size, of_shards) = self.shards, self.shard_bytes
        earlier = f"; {self.remembered} more by a check that was interrupted" if self.remembered else ""
        return [
            f"versions: {', '.join(self.versions) or 'none is released'}",
            f"read: {self.objects} objects, {self.bytes:,} bytes{earlier}",
            f"shards: {read} of {shards} read, {of_shards:,} of {size:,} bytes; of the others only that they exist",
            *(f"note: {line}" for line in self.notes),
            "all agrees" if self.holds else f"{len(self.faults)} faults",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"holds": self.holds, **vars(self)}


def verify(target: str | None, root: Path, extent: Extent = Extent()) -> Verification:
    """Verify a version, its run, data, parents and decisions; without one, every released version and the whole log.

    Args:
        target: `NAME@alias` or `NAME/number`.
        root: a clone of the repository whose commits made the versions.
        extent: how much is read.

    Raises:
        RecordError: no server is set, or there is no such version.
        ServiceError: a service does not answer; what was read is remembered, so that the next call goes on.
    """
    if server_uri() is None:
        raise RecordError("MLFLOW_TRACKING_URI is not set: the registry is on a server; run `pedigree up`")
    cache = Layout(root).cache("verify") / "read.jsonl"
    memory, ended = Memory(cache, extent.anew), False
    try:
        check = _Check(root, Objects(memory), Verification(target or EVERYTHING))
        if target:
            check.version(find_version(target, root))
        else:
            check.everything()
        check.read(extent, memory)
        ended = True
    finally:
        memory.close(ended)
    return check.found


class _Check:
    """One check: what it has read of git, MLflow and the log, its faults, and the objects to be read."""

    def __init__(self, root: Path, objects: Objects, found: Verification) -> None:
        self.root, self.objects, self.found = root, objects, found
        self.client = checked_client()
        self.log = AuditLog.from_environment()
        self.refs: dict[str, RunRefs] = run_refs(root)
        self.registered = registrations(root, self.refs)
        self.jobs: dict[tuple[str, ...], Job] = {}
        self.entries: dict[str, list[Entry] | None] = {}
        self.planned: dict[str, DataCheck] = {}
        self.experiments: dict[str, list[Any]] = {}
        self.seen: set[str] = set()
        self.unknown_artifacts = 0
        purges = [entry.details for entry in self.chain(PLATFORM) or [] if entry.action == PURGE]
        self.purged_runs = {run for purge in purges for run in purge.get("runs", ())}
        self.purged = {object_path(id_) for purge in purges for id_ in purge.get("objects", ())}  # ends of addresses

    def everything(self) -> None:
        """Check all released versions with what they came from, all models' aliases, and the whole log."""
        found = versions(self.client)
        released = [version for version in found if not ModelReference(str(version.name)).is_candidate]
        for name in sorted({str(version.name) for version in released} | set(self.log.names())):
            if self.chain(name) is not None and name != PLATFORM:
                self.faults(self.contradictions(name, [v for v in released if v.name == name]))
        anchors = [*git_anchors(self.root), *mlflow_anchors(self.client)]
        self.faults(verify_log(self.log, anchors).faults)
        for version in released:
            self.version(version)

    def version(self, version: Any) -> None:
        """Check a version, its run, and the versions that it came from."""
        address = str(ModelReference.of_version(version))
        if address in self.seen:
            return
        self.seen.add(address)
        self.found.versions.append(address)
        model = ModelReference(str(version.name)).model
        entries = self.chain(model)
        if entries is not None:
            self.faults(decision_faults(version, entries))
            if not ModelReference(str(version.name)).is_candidate and self.found.target != EVERYTHING:
                with reported():
                    named = list(self.client.search_model_versions(f"name='{model}'"))
                self.faults(self.contradictions(model, named))
        registration = self.registration(address, version, entries or [])
        tags = registration.tags if registration and Tag.COMMIT in registration.tags else version.tags
        self.files(version, tags.get(Tag.DIGEST))
        if registration:
            self.faults(tag_faults(version, registration))
            self.run(version, registration.run, tags)
        self.came_from(version, tags)

    def contradictions(self, name: str, found: Iterable[Any]) -> list[str]:
        """Return what the registry says of a released model and no event explains."""
        listed = list(found)
        with reported():
            aliases = self.client.get_registered_model(name).aliases if listed else {}
        return [f"{name}: {line}" for line in unexplained(name, self.chain(name) or [], aliases, listed)]

    def registration(self, address: str, version: Any, entries: list[Entry]) -> Registration | None:
        """Return what the record of the run says that registered a version; of a released one, its candidate."""
        candidate = address
        if not ModelReference(str(version.name)).is_candidate:
            told = (e.details.get("candidate") for e in reversed(entries) if e.subject == address)
            candidate = next(filter(None, told), version.tags.get(Tag.CANDIDATE, "(no candidate)"))
        if candidate not in self.registered:
            where = f"no run in the git repository {self.root} has registered {candidate}"
            branch = version.tags.get(Tag.BRANCH, "of its run")
            self.faults([f"{address}: {where}; fetch the branch {branch} and all tags, or it is forged"])
        return self.registered.get(candidate)

    def files(self, version: Any, digest: str | None) -> None:
        """Check the files of a version where they lie now."""
        files: dict[str, str] | None = _files(version)
        files = files if files and digest_of(files) == digest else None
        try:
            place = source_of(self.client, version)
            self.faults(model_faults(self.objects, version, place, digest, files))
        except (MissingInStorageError, RecordError) as error:
            self.faults([str(error)])

    def run(self, version: Any, run: str, tags: Mapping[str, str]) -> None:
        """Check the run that registered a version: git, data, MLflow's runs; of a run that was checked, what is new."""
        for anchor in self.stated_anchors(version, tags):
            self.faults(branch_faults(self.root, run, self.refs.get(run), {**tags, Tag.ANCHOR: anchor}))
        try:
            faults, record = commit_faults(self.root, tags)
        except (ValueError, TypeError, KeyError) as error:
            faults, record = [f"{ModelReference.of_version(version)}: its tags are not readable ({error})"], None
        self.faults(faults)
        if record is None:
            return
        weights = {tags[Tag.WEIGHTS_PATH]: tags[Tag.WEIGHTS_SHA256]}
        if record.output(parent := tags.get(Tag.PARENT, "")):
            weights[parent] = tags[Tag.PARENT_SHA256]
        self.data(record, weights)
        self.tracked(version, run, record)

    def stated_anchors(self, version: Any, tags: Mapping[str, str]) -> list[str]:
        """Return the ids of the git tag that holds a registered commit, by the tags and by the registration's event."""
        chain = self.chain(f"{ModelReference(str(version.name)).model}{CANDIDATES}") or []
        told = [e.details for e in chain if e.action == REGISTER and e.details.get("commit") == tags.get(Tag.COMMIT)]
        return [*dict.fromkeys([tags.get(Tag.ANCHOR, ""), *(d["anchor"] for d in told if d.get("anchor"))])]

    def data(self, record: Record, weights: Mapping[str, str]) -> None:
        """Plan the reading of a run's DVC objects, once, and the comparison of weights with their SHA-256."""
        revision = str(record.revision)
        if revision not in self.planned:
            self.planned[revision] = DataCheck(self.objects, record).plan()
            self.faults(self.planned[revision].faults)
            for job in self.planned[revision].jobs:
                self.jobs.setdefault(job.key, job)
        for path, sha256 in weights.items():
            if job := self.planned[revision].weights_job(f"{path}/{WEIGHTS_FILE}", sha256):
                self.jobs.setdefault(job.key, job)

    def tracked(self, version: Any, run: str, record: Record) -> None:
        """Check MLflow's runs of a pipeline run, and those of earlier ones whose outputs it restored."""
        own = self.found_run(version)
        if own is None:
            return
        passport = _files(version).get(f"artifacts/{PASSPORT}")
        for found in self.finished_runs(own.info.experiment_id):
            mine, of = found.info.run_id == version.run_id, found.data.tags.get("pedigree.run", "")
            there = record if of == run else self.record_of(of)
            if there is None or not (mine or self.made(found, of == run, there, record)):
                continue
            if found.info.run_id not in self.seen:
                self.seen.add(found.info.run_id)
                self.mlflow_run(found, there, passport if mine else None)

    def made(self, found: Any, own: bool, there: Record, record: Record) -> bool:
        """Return whether one of MLflow's runs is of a stage that made outputs of a record."""
        return not is_registration(found) and (own or same_stage(found, there, record))

    def found_run(self, version: Any) -> Any | None:
        """Return MLflow's run of a registration; None, and a fault, unless it is there and finished."""
        from mlflow.exceptions import MlflowException

        told = f"MLflow run {version.run_id} of {ModelReference.of_version(version)}"
        with reported():
            try:
                run = self.client.get_run(version.run_id)
            except MlflowException as error:
                if error.error_code not in NOT_IN_MLFLOW:
                    raise
                self.faults([f"{told} is not there"])
                return None
        if (run.info.lifecycle_stage, run.info.status) != ("active", "FINISHED"):
            self.faults([f"{told} is {run.info.lifecycle_stage} and {run.info.status}, not active and FINISHED"])
        return run

    def finished_runs(self, experiment: str) -> list[Any]:
        """Return MLflow's finished runs of an experiment, which is a model's."""
        if experiment not in self.experiments:
            with reported():
                name = self.client.get_experiment(experiment).name
            self.experiments[experiment] = mlflow_runs(self.client, [name], "attributes.status = 'FINISHED'")
        return self.experiments[experiment]

    def mlflow_run(self, run: Any, record: Record, passport: str | None) -> None:
        """Check the metrics of one of MLflow's runs, and plan the reading of its artifacts."""
        self.faults(metric_faults(run, record))
        jobs, unknown = artifact_jobs(self.objects, run, record, passport)
        self.unknown_artifacts += unknown
        for job in jobs:
            self.jobs.setdefault((job.address,), job)
        if run.data.tags.get("pedigree.run") in self.purged_runs:
            self.purged |= {job.address for job in jobs if job.address.lower().endswith(PICTURES)}

    def record_of(self, run: str) -> Record | None:
        """Return the record at the end of a pipeline run; None if this repository lacks the run."""
        refs = self.refs.get(run)
        if refs is None:
            return None
        return Record(self.root, refs.tip or refs.anchors[-1].commit)

    def came_from(self, version: Any, tags: Mapping[str, str]) -> None:
        """Check the candidate and the teacher of a version; a candidate that was deleted is none."""
        address = ModelReference.of_version(version)
        parent, stated = tags.get(Tag.PARENT, ""), tags.get(Tag.PARENT_SHA256)
        for reference in (version.tags.get(Tag.CANDIDATE, ""), parent):
            if ModelReference.parse(reference) is None or reference.startswith(f"{RELATIVE.models}/"):
                continue
            try:
                found = find_version(reference, self.root)
            except RecordError as error:
                self.faults([f"{address}: its parent {error}"] if reference == parent else [])
                continue
            if reference == parent and found.tags.get(Tag.WEIGHTS_SHA256) != stated:
                self.faults([f"{reference}: has other weights than those that made {address}"])
            self.version(found)

    def chain(self, name: str) -> list[Entry] | None:
        """Return the verified audit events of a model; None if its chain is broken."""
        if name not in self.entries:
            try:
                self.entries[name] = self.log.read(name)
            except RecordError as error:
                self.entries[name] = None
                self.faults([str(error)])
        return self.entries[name]

    def faults(self, lines: Iterable[str]) -> None:
        """Add faults, each once."""
        self.found.faults += [line for line in dict.fromkeys(lines) if line not in self.found.faults]

    def read(self, extent: Extent, memory: Memory) -> None:
        """Read the objects: of shards a share, all else whole."""
        jobs = list(self.jobs.values())
        shards = [job for job in jobs if job.shard]
        seed = memory.get("seed") or ("", secrets.randbits(32))
        memory.put("seed", *seed)
        chosen = choose(shards, extent.share, ALWAYS_BYTES, seed[1])
        left = [Job(job.address, partial(self.exists, job.address)) for job in shards if job not in chosen]
        faults, away = run_jobs([*(job for job in jobs if not job.shard), *chosen, *left]), tuple(self.purged)
        gone = sorted({line for line in faults if line.endswith(GONE) and line.removesuffix(GONE).endswith(away)})
        self.faults(line for line in faults if line not in gone)
        found, read = self.found, self.objects
        found.shards, found.shard_bytes = (len(shards), len(chosen)), (_size(shards), _size(chosen))
        found.objects, found.bytes, found.remembered = read.objects, read.bytes, read.remembered
        if gone:
            found.notes.append(f"{len(gone)} objects were purged, as the audit log says: {some_of(gone)}")
        if self.unknown_artifacts:
            found.notes.append(f"{self.unknown_artifacts} artifacts of MLflow's runs are in no commit: not compared")

    def exists(self, address: str) -> list[str]:
        """Check only that an object is there."""
        self.objects.size(address)
        return []


def _files(version: Any) -> dict[str, str]:
    """Return the files that the tags of a version list; empty if they are not readable."""
    try:
        found = json.loads(version.tags.get(Tag.FILES, ""))
    except ValueError:
        return {}
    return {str(path): str(sha256) for path, sha256 in found.items()} if isinstance(found, dict) else {}


def _size(jobs: Iterable[Job]) -> int:
    return sum(job.size for job in jobs)
