"""Check the checkout's git repository for a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.core.errors import PedigreeError
from components.core.git import call_git, try_git


class WorkspaceError(PedigreeError):
    """A run's workspace cannot be created; the message says why and what to do."""


@dataclass(frozen=True)
class Head:
    """The current commit of a checkout, and its index file."""

    commit: str
    index: Path


def head_commit(checkout: Path) -> str:
    """Return the checkout's current commit.

    Raises:
        WorkspaceError: not the top folder of a git repository, owned by another user, or without a commit.
        GitError: git is missing.
    """
    return head(checkout).commit


def head(checkout: Path) -> Head:
    """Return the checkout's commit and index, with the checks of `head_commit`."""
    queries = ("--is-inside-work-tree", "--show-prefix", "--git-path", "index", "--show-superproject-working-tree")
    done = call_git(checkout, "rev-parse", *queries)
    refused = done.stderr.decode(errors="replace")
    if done.returncode and "not a git repository (or any" not in refused:  # owned by another user
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
    if above and (checkout / ".git").is_file():  # its git folder is in the parent's, which DVC does not support
        raise WorkspaceError(
            f"{checkout} is a submodule of {above}, and DVC cannot work in one: clone Pedigree into a folder of its own"
        )
    commit = try_git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        raise WorkspaceError(f"{checkout} has no commit yet, and a run is a commit: `git add -A && git commit`")
    return Head(commit, checkout / index)
