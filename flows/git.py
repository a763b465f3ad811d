"""What a run needs of the checkout's git repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.core.errors import PedigreeError
from components.core.git import call_git, try_git


class WorkspaceError(PedigreeError):
    """The checkout cannot give a run its folder; the message says why and what to do."""


@dataclass(frozen=True)
class Head:
    """The commit that a checkout is at, and git's index of it."""

    commit: str
    index: Path


def head_commit(checkout: Path) -> str:
    """Return the commit that the checkout is at.

    Raises:
        WorkspaceError: not a git repository of which the checkout is the top folder, that of another user, or one
            without a commit.
        GitError: git is missing.
    """
    return head(checkout).commit


def head(checkout: Path) -> Head:
    """Return the checkout's commit and index, as `head_commit` does."""
    asked = ("--is-inside-work-tree", "--show-prefix", "--git-path", "index", "--show-superproject-working-tree")
    done = call_git(checkout, "rev-parse", *asked)
    refused = done.stderr.decode(errors="replace")
    if done.returncode and "not a git repository (or any" not in refused:  # it belongs to another user
        raise WorkspaceError(f"git: {' '.join(refused.split())}")
    said = done.stdout.decode(errors="surrogateescape")
    inside, prefix, index, above = (*said.split("\n"), "", "", "", "")[:4]
    if inside != "true":
        raise WorkspaceError(f"{checkout} is not a git repository, and a run is a commit: `git init`, then commit")
    if prefix:
        raise WorkspaceError(
            f"{checkout} is the folder {prefix} of a git repository, and a run is a commit of a whole repository: "
            "clone Pedigree into a repository of its own"
        )
    if above and (checkout / ".git").is_file():  # its git folder is in the one above, where DVC takes it to be
        raise WorkspaceError(
            f"{checkout} is a submodule of {above}, and DVC cannot work in one: clone Pedigree into a folder of its own"
        )
    commit = try_git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        raise WorkspaceError(f"{checkout} has no commit yet, and a run is a commit: `git add -A && git commit`")
    return Head(commit, checkout / index)
