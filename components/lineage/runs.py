"""Read the runs of this repository from git: their states, ends and registered versions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.git import git
from components.core.layout import RELATIVE, Layout
from components.core.locks import is_locked
from components.core.references import RUN_ID
from components.lineage.anchors import ANCHORS
from components.lineage.lock_file import Record

BRANCHES = "refs/heads/runs/"
RUNNING, FINISHED, FAILED, INTERRUPTED, LOST = "running", "finished", "failed", "interrupted", "lost"
_STAGE_ENDED = re.compile(r"(?P<stage>[^:\s]+): (?:ran for (?P<seconds>\d+) s|restored|unchanged)")  # of subjects
_ENDS = {"Run finished": FINISHED, "Run failed": FAILED, "Run interrupted": INTERRUPTED}


@dataclass(frozen=True)
class Commit:
    """A commit of a run; `time` is in seconds since 1970."""

    sha: str
    time: int
    subject: str


@dataclass(frozen=True)
class StageEnd:
    """Time of a stage's commit in seconds since 1970, and how long it ran; None: its outputs were there already."""

    time: int
    seconds: int | None


@dataclass(frozen=True)
class Run:
    """A run, by its branch `runs/<id>`.

    Attributes:
        commits: its own, newest first; empty while it starts.
        folder: its worktree, if it exists.
        locked: whether a process holds its lock file.
    """

    id: str
    commits: tuple[Commit, ...]
    folder: Path | None
    locked: bool

    @property
    def branch(self) -> str:
        """Name of its branch."""
        return f"runs/{self.id}"

    @property
    def tip(self) -> str:
        """Its last commit."""
        return self.commits[0].sha

    @property
    def started(self) -> int | None:
        """Start time in seconds since 1970."""
        return self.commits[-1].time if self.commits else None

    @property
    def ended(self) -> int | None:
        """Time of its last commit; None while it runs."""
        return None if self.locked or not self.commits else self.commits[0].time

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed`, `interrupted`, or `lost` if it ended without a closing commit."""
        if self.locked:
            return RUNNING
        return _ENDS.get(self._closing[0], LOST)

    @property
    def reason(self) -> str | None:
        """Reason of a failure or interrupt; for a lost run, its last commit."""
        if self.state in (FAILED, INTERRUPTED):
            return self._closing[1]
        return f"no closing commit; the last one: {self.commits[0].subject}" if self.state == LOST else None

    @property
    def computed(self) -> list[str]:
        """Stages that ran rather than being unchanged or restored."""
        subjects = (commit.subject.partition(": ") for commit in reversed(self.commits))
        return [stage for stage, _, how in subjects if how.startswith("ran for ")]

    @property
    def _closing(self) -> tuple[str, str]:
        start, _, rest = self.commits[0].subject.partition(": ")
        return start, rest


@dataclass(frozen=True)
class Worktree:
    """A git worktree: the checkout, a run's folder, or one created by hand."""

    folder: Path
    head: str
    branch: str | None


def find_runs(root: Path) -> list[Run]:
    """Return all runs with a branch or a lock, newest first, including those of other checkouts of this repository."""
    branches = set(refs(root, BRANCHES))
    names = {ref.removeprefix(BRANCHES) for ref in branches}
    folders = {tree.branch: tree.folder for tree in worktrees(root) if tree.branch and tree.folder.is_dir()}
    locks = {path.stem: path for path in Layout(root).runs.glob("*.lock")}
    locks |= {name: folders[ref].with_name(f"{name}.lock") for name in names if (ref := f"{BRANCHES}{name}") in folders}
    names |= {name for name, path in locks.items() if is_locked(path)}  # a starting run has no branch yet
    found = []
    for name in names:
        commits = tuple(_own_commits(root, name)) if f"{BRANCHES}{name}" in branches else ()
        folder = folders.get(f"{BRANCHES}{name}")
        found.append(Run(name, commits, folder, name in locks and is_locked(locks[name])))
    return sorted(found, key=lambda run: (run.started or float("inf"), run.id), reverse=True)


def registered(root: Path, run: Run) -> list[dict[str, Any]]:
    """Return the versions that a run registered or found registered, each with `name` and `version`."""
    if not any(commit.subject.startswith("register: ") for commit in run.commits):
        return []  # the result file is from the checkout
    found = json.loads(Record(root, run.tip).read(str(RELATIVE.result("register"))) or b"{}")
    return [version for version in found.values() if isinstance(version, dict) and "version" in version]


def stage_ends(root: Path, commit: str) -> dict[str, StageEnd]:
    """Return the end of each stage, by the commits of its run up to this one.

    Raises:
        GitError: there is no such commit here.
    """
    found: dict[str, StageEnd] = {}
    for line in git(root, "log", "--first-parent", "-n", "200", "--format=%ct %s", commit, "--").splitlines():
        time, _, subject = line.partition(" ")
        if subject.startswith("Run ") and RUN_ID.search(subject):
            break
        if ended := _STAGE_ENDED.fullmatch(subject):
            seconds = ended["seconds"]
            found.setdefault(ended["stage"], StageEnd(int(time), None if seconds is None else int(seconds)))
    return found


def worktrees(root: Path) -> list[Worktree]:
    """Return the worktrees of this repository, each with the project's folder in it."""
    prefix = git(root, "rev-parse", "--show-prefix")
    found = []
    for block in git(root, "worktree", "list", "--porcelain").split("\n\n"):
        facts = {key: value for key, _, value in (line.partition(" ") for line in block.splitlines())}
        if set(facts.get("HEAD", "0")) != {"0"}:  # skip bare repositories and those without commits
            found.append(Worktree(Path(facts["worktree"], prefix), facts["HEAD"], facts.get("branch")))
    return found


def refs(root: Path, *patterns: str) -> list[str]:
    """Return the names of git references that match the patterns."""
    return git(root, "for-each-ref", "--format=%(refname)", *patterns).splitlines()


def _own_commits(root: Path, name: str) -> list[Commit]:
    """Return the branch's commits back to the run's first; for a foreign branch, those on no other branch."""
    branch, form = f"{BRANCHES}{name}", "--format=%H%x1f%ct%x1f%s"
    found = []
    for line in git(root, "log", "--first-parent", "-n", "200", form, branch, "--").splitlines():
        found.append(_commit(line))
        if found[-1].subject == f"Run {name}":
            return found
    others = ["--not", f"--exclude={BRANCHES}*", f"--exclude={ANCHORS}*", "--all"]
    lines = git(root, "log", form, branch, *others, "--").splitlines()
    return [_commit(line) for line in lines] or found[:1]


def _commit(line: str) -> Commit:
    sha, time, subject = line.split("\x1f", 2)
    return Commit(sha, int(time), subject)
