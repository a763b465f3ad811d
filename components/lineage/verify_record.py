"""Verify what the registry says of a version against git and the audit log, without reading data.

A run's register stage writes what it registered into `reports/register/result.json`, which is committed with the run
and held by its anchors. `pedigree trace` and `pedigree verify` share these checks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.git import call_git, try_git
from components.core.layout import RELATIVE
from components.core.model_files import digest_of
from components.core.references import ModelReference
from components.core.text import one_line
from components.lineage.anchors import Anchor, read_anchors
from components.lineage.audit_chain import PROMOTE, REJECT, TAKEDOWN, Entry
from components.lineage.champions import CHANGES
from components.lineage.lock_file import Record, find_record
from components.lineage.provenance import DECISION_TAGS, EVALUATION, POOL, Tag, data_versions

RESULT = str(RELATIVE.result("register"))
ENDS = ("Run finished", "Run failed", "Run interrupted")  # prefixes of the subject of a run's closing commit
OURS = "pedigree."
# Recorded since the first registration, before a run's record listed all tags.
ALWAYS = {"digest": Tag.DIGEST, "weights_sha256": Tag.WEIGHTS_SHA256, "verdict": Tag.VERDICT}


@dataclass(frozen=True)
class Registration:
    """What a run's record says of a version that it registered.

    Attributes:
        run: its id.
        revision: commit with the record.
        tags: of the version; of runs of earlier releases only some.
    """

    run: str
    revision: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RunRefs:
    """Branch and anchors of a run in one repository; `tip` is None without a branch, here or of a remote."""

    tip: str | None
    anchors: tuple[Anchor, ...]

    @property
    def revisions(self) -> tuple[str, ...]:
        """Its commits that references name: what is anchored first."""
        return (*(anchor.commit for anchor in self.anchors), *((self.tip,) if self.tip else ()))


def run_refs(root: Path) -> dict[str, RunRefs]:
    """Return branch and anchors of each run in the repository, by run id, sorted."""
    tips: dict[str, str] = {}
    anchors: dict[str, list[Anchor]] = {}
    for anchor in read_anchors(root):
        anchors.setdefault(anchor.run, []).append(anchor)
    branches = ["runs/*", *anchors]  # the latter: of registrations by hand, on other branches
    patterns = [f"refs/{place}/{branch}" for place in ("heads", "remotes/*") for branch in branches]
    for line in (try_git(root, "for-each-ref", "--format=%(refname) %(objectname)", *patterns) or "").splitlines():
        name, commit = line.split()
        branch = name.removeprefix("refs/heads/") if name.startswith("refs/heads/") else name.split("/", 3)[3]
        tips.setdefault(branch.removeprefix("runs/"), commit)  # local branches come first
    return {run: RunRefs(tips.get(run), tuple(anchors.get(run, ()))) for run in sorted({*tips, *anchors})}


def registrations(root: Path, refs: Mapping[str, RunRefs]) -> dict[str, Registration]:
    """Return the first run's record of each registered version, by `NAME/NUMBER`."""
    found: dict[str, Registration] = {}
    for run, of_run in refs.items():
        for revision in of_run.revisions:
            for stated in _results(root, revision):
                address = f"{stated.get('name')}/{stated.get('version')}"
                tags = {tag: str(stated[key]) for key, tag in ALWAYS.items() if key in stated}
                found.setdefault(address, Registration(run, revision, {**tags, **stated.get("tags", {})}))
    return found


def tag_faults(version: Any, registration: Registration) -> list[str]:
    """Return where the tags of a version are not what the run's record says; decisions are not among these."""
    address, found = ModelReference.of_version(version), version.tags
    where = f"git ({RESULT} at {registration.revision[:12]})"
    faults = []
    for tag, stated in registration.tags.items():
        if tag not in found:
            faults.append(f"tag {tag} of {address} was deleted; {where} has {one_line(stated)}")
        elif found[tag] != stated:
            faults.append(f"tag {tag} of {address} is {one_line(found[tag])}, but {where} has {one_line(stated)}")
    if _digest(found.get(Tag.FILES)) != registration.tags.get(Tag.DIGEST):
        faults.append(f"tag {Tag.FILES} of {address} does not list the files that {where} has the digest of")
    if Tag.COMMIT in registration.tags:  # else the record is of an earlier release, and lists some of the tags only
        added = {tag for tag in found if tag.startswith(OURS)} - {*registration.tags, *DECISION_TAGS, Tag.FILES}
        faults += [f"tag {tag} of {address} was added; {where} lacks it" for tag in sorted(added)]
    return faults


def decision_faults(version: Any, entries: Sequence[Entry]) -> list[str]:
    """Return where the tags of a version that decisions set are not what the audit log says.

    Args:
        version: released or candidate.
        entries: audit events of its model.
    """
    address = str(ModelReference.of_version(version))
    stated: dict[str, str | None] = dict.fromkeys(DECISION_TAGS)
    for entry in entries:
        if entry.subject == address and entry.action in CHANGES:
            stated[Tag.AUDIT] = f"{entry.sequence}:{entry.hash}"
            stated[Tag.CANDIDATE] = entry.details.get("candidate")
        elif entry.subject == address and entry.action == REJECT:
            stated[Tag.REJECTED] = f"{entry.actor}, event {entry.sequence}: {entry.details.get('reason', '')}"
        elif entry.subject == address and entry.action == TAKEDOWN:
            stated[Tag.TAKEDOWN] = f"{entry.details.get('takedown')}: {entry.details.get('reason', '')}"
        elif entry.action == PROMOTE and entry.details.get("candidate") == address:
            stated[Tag.RELEASED] = entry.subject
    if ModelReference(str(version.name)).is_candidate:
        relevant: tuple[Tag, ...] = (Tag.RELEASED, Tag.REJECTED, Tag.TAKEDOWN)
    else:
        relevant = (Tag.CANDIDATE, Tag.AUDIT, Tag.TAKEDOWN)
    told = {tag: version.tags.get(tag) for tag in relevant}
    return [
        f"tag {tag} of {address} is {one_line(value) if value else 'missing'}, by the audit log it is "
        f"{one_line(stated[tag] or '') or 'not set'}"
        for tag, value in told.items()
        if " ".join((value or "").split()) != " ".join((stated[tag] or "").split())
    ]


def branch_faults(root: Path, run: str, refs: RunRefs | None, tags: Mapping[str, str]) -> list[str]:
    """Return how the branch of a run was rewritten or deleted, by its anchors and the registered commit.

    Args:
        root: of the repository.
        run: its id.
        refs: what there is of it.
        tags: of a version that it registered.
    """
    branch = tags.get(Tag.BRANCH, f"runs/{run}")
    anchors, tip = refs.anchors if refs else (), refs.tip if refs else None
    faults = []
    if (id_ := tags.get(Tag.ANCHOR)) and id_ not in {anchor.id for anchor in anchors}:
        faults.append(f"anchor of run {run} (tag object {id_}) is gone or was made again; fetch all tags of its remote")
    if tip is None:
        held = f"`git branch {branch} {anchors[-1].commit}` makes it again" if anchors else "fetch it from its remote"
        return [*faults, f"branch {branch} is not in this repository, or was deleted; {held}"]
    held_commits = {anchor.commit: f"anchored as {anchor.name}" for anchor in anchors}
    for commit, why in {tags.get(Tag.COMMIT, tip): "registered", **held_commits}.items():
        if call_git(root, "merge-base", "--is-ancestor", commit, tip).returncode:
            faults.append(f"branch {branch} was rewritten: {commit} ({why}) is not in it")
    ends = [c for c in held_commits if (try_git(root, "show", "-s", "--format=%s", c) or "").startswith(ENDS)]
    if not faults and ends and tip not in ends:
        faults.append(f"branch {branch} has commits after the end of its run, {ends[0]}")
    return faults


def commit_faults(root: Path, tags: Mapping[str, str]) -> tuple[list[str], Record | None]:
    """Return where the registered commit contradicts itself or the tags, and the record of the registration."""
    commit = tags.get(Tag.COMMIT, "")
    if not commit or call_git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        advice = "fetch the run's branch and tags"
        return [f"commit {commit or '(none)'} is not in the git repository {root}; {advice}"], None
    record = find_record(root, commit, tags.get(Tag.LOCK_SHA256))
    if record is None:
        told = f"SHA-256 of its stages {tags.get(Tag.LOCK_SHA256)}"
        return [f"dvc.lock at {commit} and after it is not the one that was registered ({told})"], None
    stated = {v.path: v.dvc for tag in (Tag.CURATED, Tag.POOL, Tag.EVALUATION) for v in data_versions(tags, tag)}
    stated[tags.get(Tag.WEIGHTS_PATH, "(no path of weights)")] = tags.get(Tag.WEIGHTS_DVC, "(none)")
    tracked = record.tracked(POOL) | record.tracked(EVALUATION)
    there = {path: tracked.get(path) or record.output(path) for path in stated} | tracked
    where = f"dvc.lock and .dvc files at {str(record.revision)[:12]}"
    faults = [
        f"{path}: registered with {stated.get(path, 'nothing')}, but {where} record {id_ or 'nothing'}"
        for path, id_ in there.items()
        if id_ != stated.get(path)
    ]
    return faults + report_faults(record), record


def report_faults(record: Record) -> list[str]:
    """Return the stages' outputs in git that are not the bytes that `dvc.lock` of the commit records."""
    faults = []
    for name, stage in record.stages().items():
        for out in stage.get("outs", []):
            data = record.read(out["path"])
            if data is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != out["md5"]:
                where = f"{out['path']} at {str(record.revision)[:12]}"
                faults.append(f"{where}: not what stage {name} recorded in dvc.lock")
    return faults


def _results(root: Path, revision: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(Record(root, revision).read(RESULT) or b"{}")
    except ValueError:
        return []
    return [stated for stated in found.values() if isinstance(stated, dict)] if isinstance(found, dict) else []


def _digest(files: str | None) -> str | None:
    try:
        return digest_of(json.loads(files or ""))
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
