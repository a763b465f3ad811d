"""Anchor the commits of runs by annotated tags, which `git gc` keeps and a rewrite of the branch does not move.

A clone has them without asking. The id of the tag object stands among the tags of the registered version, so that a tag
that was made again is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from components.core.git import GitError, git, try_git

ANCHORS = "refs/tags/anchors/"  # with RUN-ID/COMMIT below
MAKER = {"GIT_COMMITTER_NAME": "Pedigree", "GIT_COMMITTER_EMAIL": "pedigree@localhost"}


@dataclass(frozen=True)
class Anchor:
    """A tag that holds a commit of a run; `id` is of the tag object."""

    run: str
    id: str
    commit: str

    @property
    def name(self) -> str:
        """Name of the tag."""
        return anchor_name(self.run, self.commit)


def anchor_name(run: str, commit: str) -> str:
    """Return the name of the tag that anchors a commit of a run."""
    return f"anchors/{run}/{commit[:12]}"


def set_anchor(root: Path, run: str, commit: str) -> str:
    """Anchor a commit of a run, unless it is anchored, and return the id of the tag object.

    Raises:
        GitError: git refuses the tag.
    """
    name = anchor_name(run, commit)
    if found := _tag_object(root, name):
        return found
    try:
        git(root, "tag", "--annotate", "--no-sign", "--message", f"Commit of run {run}", name, commit, extra=MAKER)
    except GitError:
        if not _tag_object(root, name):  # else another process set it first
            raise
    return git(root, "rev-parse", f"refs/tags/{name}")


def read_anchors(root: Path, run: str = "") -> list[Anchor]:
    """Return the anchors of a run, or of all runs, by name."""
    form = "--format=%(refname) %(objectname) %(*objectname)"
    found = []
    for line in (try_git(root, "for-each-ref", form, f"{ANCHORS}{run}") or "").splitlines():
        name, id_, *commit = line.split()
        found.append(Anchor(name.removeprefix(ANCHORS).rpartition("/")[0], id_, (commit or [id_])[0]))
    return found


def anchor_of(ref: str, runs: Iterable[str]) -> bool:
    """Return whether a reference is an anchor of one of these runs."""
    return ref.startswith(ANCHORS) and ref.removeprefix(ANCHORS).rpartition("/")[0] in runs


def _tag_object(root: Path, name: str) -> str | None:
    return try_git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{name}")
