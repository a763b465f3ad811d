"""Git as runs call it: no hook, no signature, one clear line where git refuses."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from components.core.errors import PedigreeError

# A run's commits are made by a program: hooks and signing keys are for a person's own commits.
PLAIN = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false")


class WorkspaceError(PedigreeError):
    """The checkout cannot give a run its folder; the message says why and what to do."""


@dataclass(frozen=True)
class Head:
    """The commit that a checkout is at, and git's index of it."""

    commit: str
    index: Path


def git(
    root: Path, *arguments: str, check: bool = True, extra: dict[str, str] | None = None, given: str | None = None
) -> str:
    """Return what a git command prints; runs are committed as Pedigree where the user has set no identity.

    Args:
        root: folder that git works in.
        arguments: the command and its options.
        check: raise where git refuses.
        extra: variables added to the environment.
        given: text for its standard input.

    Raises:
        WorkspaceError: git is missing or refuses.
    """
    done = _call(root, arguments, extra or {}, given)
    if check and done.returncode:
        raise WorkspaceError(f"git {arguments[0]}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
    return done.stdout.strip()


def head_commit(checkout: Path) -> str:
    """Return the commit that the checkout is at.

    Raises:
        WorkspaceError: not a git repository of which the checkout is the top folder, or one without a commit.
    """
    return head(checkout).commit


def head(checkout: Path) -> Head:
    """Return the checkout's commit and index, as `head_commit` does."""
    asked = ("--is-inside-work-tree", "--show-prefix", "--git-path", "index", "--show-superproject-working-tree")
    done = _call(checkout, ("rev-parse", *asked), {}, None)
    if done.returncode and "not a git repository (or any" not in done.stderr:  # it belongs to another user
        raise WorkspaceError(f"git: {' '.join(done.stderr.split())}")
    inside, prefix, index, above = (*done.stdout.split("\n"), "", "", "", "")[:4]
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
    commit = git(checkout, "rev-parse", "--verify", "--quiet", "HEAD", check=False)
    if not commit:
        raise WorkspaceError(f"{checkout} has no commit yet, and a run is a commit: `git add -A && git commit`")
    return Head(commit, checkout / index)


def _call(
    root: Path, arguments: tuple[str, ...], extra: dict[str, str], given: str | None
) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "LC_ALL": "C", **extra}
    if arguments[0] in {"commit", "commit-tree"}:
        variables |= _identity(root)
    try:
        return subprocess.run(
            ["git", "-C", os.fspath(root), *PLAIN, *arguments], input=given, env=variables, check=False,
            stdin=None if given is not None else subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            errors="surrogateescape",
        )  # fmt: skip
    except FileNotFoundError:
        raise WorkspaceError("git is not installed, and a run is a commit") from None


def _identity(root: Path) -> dict[str, str]:
    asked = ["git", "-C", os.fspath(root), "config", "user.email"]
    if os.environ.get("GIT_AUTHOR_EMAIL") or subprocess.run(asked, capture_output=True, check=False).stdout:
        return {}
    return {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "Pedigree"), ("EMAIL", "pedigree@localhost"))
    }
