"""Determine which runs and DVC objects `gc` keeps, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components.core.git import git, try_git
from components.core.layout import RELATIVE
from components.core.references import RUN_ID
from components.lineage.anchors import ANCHORS, anchor_of
from components.lineage.lock_file import Record, RecordError, find_record
from components.lineage.needs import Needs, read_yaml
from components.lineage.runs import BRANCHES, Run, worktrees

if TYPE_CHECKING:
    from components.lineage.claims import Claim

PARAMS = str(RELATIVE.params)


@dataclass(frozen=True)
class Rule:
    """A run is removed if it is not among the newest `keep` and ended before `before` (seconds since 1970)."""

    keep: int
    before: float


@dataclass
class NeededObjects:
    """Objects to keep.

    Attributes:
        ids: of needed DVC objects.
        elsewhere: versions and events of other repositories, whose data is not here.
    """

    ids: set[str] = field(default_factory=set)
    elsewhere: list[str] = field(default_factory=list)


def kept_runs(root: Path, runs: Sequence[Run], rule: Rule, claims: Iterable[Claim]) -> dict[str, str]:
    """Return run id -> the first reason to keep it, as `KIND: DETAILS`.

    `runs` are all runs, newest first.
    """
    why: dict[str, str] = {}
    for number, run in enumerate(runs):
        if run.locked:
            why[run.id] = "running: it goes on"
        elif number < rule.keep:
            why[run.id] = f"newest: among the newest {rule.keep}"
        elif run.ended is None or run.ended > rule.before:
            why[run.id] = "young: it ended too short a time ago"
    makers = {commit.sha: run.id for run in runs for commit in run.commits}
    there = {run.id for run in runs}
    for claim in claims:
        for name in (claim.runs & there) | {makers[sha] for sha in claim.commits if sha in makers}:
            why.setdefault(name, f"{claim.because}: {claim.by}")
    own = {run.folder for run in runs}
    for tree in worktrees(root):
        if (maker := makers.get(tree.head)) and tree.folder not in own:
            why.setdefault(maker, f"checked out: in {tree.folder}")
    return _with_named(root, runs, why)


def needed_objects(
    root: Path, gone: Iterable[Run], claims: Sequence[Claim], needs: Needs, here: Iterable[str]
) -> NeededObjects:
    """Return the objects that anything but the removed runs needs.

    `here` are the ids of all objects in the cache or on the remote.

    Raises:
        RecordError: the commit of a registered version is missing, but some of its data is present.
    """
    ids = {run.id for run in gone}
    away, needed = {f"{BRANCHES}{name}" for name in ids}, NeededObjects()
    refs = _commits_of_refs(root)
    tips_of = {name: sha for name, sha in refs if name not in away and not anchor_of(name, ids)}
    trees = [tree for tree in worktrees(root) if tree.branch not in away]
    tips = {*tips_of.values(), *(tree.head for tree in trees)}
    covered = tips | _commits_of_runs(root, [name for name in tips_of if name.startswith(BRANCHES)])
    for sha in covered:
        needed.ids |= needs.of_commit(sha)
    for tree in trees:
        if tree.folder.is_dir():
            needed.ids |= needs.of_folder(tree.folder)
    needed.ids |= needs.of_history(sorted(tips))
    lying = set(here)
    for claim in claims:
        ids = needs.whole(claim.ids & lying)
        absent = _absent(root, claim.commits - covered)
        if absent and ids:
            raise RecordError(
                f"{claim.by}: commit {min(absent)[:12]} is not in this repository, but its data is here, so what it "
                f"needs is unknown; fetch its branch {' '.join(f'runs/{name}' for name in claim.runs)} first, "
                "or, if that is lost, delete the version in MLflow"
            )
        needed.ids |= ids.union(*(_registered_at(root, sha, claim, needs) for sha in claim.commits - covered - absent))
        needed.elsewhere += [claim.by] if absent else []
    return needed


def only_needed_by(root: Path, runs: Iterable[Run], needs: Needs) -> dict[str, set[str]]:
    """Return run id -> the DVC objects that only the run's last commit needs."""
    of = {run.id: needs.of_commit(run.tip) for run in runs if run.commits}
    users = Counter(id_ for ids in of.values() for id_ in ids)
    others = [needs.of_commit(sha) for name, sha in _commits_of_refs(root) if not name.startswith((BRANCHES, ANCHORS))]
    own = {f"{BRANCHES}{name}" for name in of}
    others += [needs.of_folder(t.folder) for t in worktrees(root) if t.branch not in own and t.folder.is_dir()]
    shared = set().union(*others)
    return {name: {id_ for id_ in ids if users[id_] == 1} - shared for name, ids in of.items()}


def model_names(root: Path, runs: Iterable[Run]) -> set[str]:
    """Return the names of models of the checkout and its runs, which are MLflow's experiments."""
    texts = [Record(root).read(PARAMS), *(Record(root, run.tip).read(PARAMS) for run in runs if run.commits)]
    values = [read_yaml(text, PARAMS) for text in texts if text]
    return {str(found["name"]) for found in values if isinstance(found, Mapping) and found.get("name")}


def _with_named(root: Path, runs: Sequence[Run], why: dict[str, str]) -> dict[str, str]:
    """Add runs named in the parameters of the checkout or of a kept run, such as a teacher's folder."""
    named = {
        run.id: set(RUN_ID.findall((Record(root, run.tip).read(PARAMS) or b"").decode())) for run in runs if run.commits
    }
    own = set(RUN_ID.findall((Record(root).read(PARAMS) or b"").decode()))
    todo = [("the checkout", own), *((f"run {name}", named.get(name, set())) for name in list(why))]
    while todo:
        by, names = todo.pop()
        for name in sorted(names & named.keys() - why.keys()):
            why[name] = f"named: by {PARAMS} of {by}"
            todo.append((f"run {name}", named[name]))
    return why


def _registered_at(root: Path, sha: str, claim: Claim, needs: Needs) -> set[str]:
    """Return the needs of a commit outside of runs, and of its successor with the `dvc.lock` of the registration."""
    record = find_record(root, sha, claim.lock_sha256) if claim.lock_sha256 else None
    return needs.of_commit(sha) | (needs.of_commit(record.revision) if record and record.revision else set())


def _commits_of_runs(root: Path, branches: Sequence[str]) -> set[str]:
    """Return all commits of runs, one per stage, to include outputs that later commits replaced."""
    if not branches:
        return set()
    others = ("--not", f"--exclude={BRANCHES}*", f"--exclude={ANCHORS}*", "--all", "--")
    return set(git(root, "rev-list", *branches, *others).split())


def _commits_of_refs(root: Path) -> list[tuple[str, str]]:
    """Return (name, commit) of each reference to a commit, directly or by a tag."""
    form = "--format=%(refname) %(objecttype) %(objectname) %(*objecttype) %(*objectname)"
    found = []
    for line in git(root, "for-each-ref", form).splitlines():
        name, *facts = line.split()
        found += [(name, sha) for kind, sha in zip(facts[::2], facts[1::2], strict=True) if kind == "commit"]
    return found


def _absent(root: Path, commits: Iterable[str]) -> set[str]:
    """Return the commits that are missing in the repository."""
    return {sha for sha in commits if try_git(root, "cat-file", "-e", sha) is None}
