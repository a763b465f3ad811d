"""Call git without hooks, signatures or prompts, with English messages and unquoted names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from components.core.errors import PedigreeError

# A run's commits are made by a program: hooks and signing keys are for a person's own commits.
PLAIN = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false")


class GitError(PedigreeError):
    """Git is missing or failed; the message includes git's own."""


def git(root: Path, *arguments: str, extra: dict[str, str] | None = None, given: str | None = None) -> str:
    """Return the output of a git command; commits use the identity Pedigree if the user has none.

    Args:
        root: working directory.
        arguments: the command and its options.
        extra: additional environment variables.
        given: standard input.

    Raises:
        GitError: git is missing or failed.
    """
    done = call_git(root, *arguments, extra=extra, given=given)
    if done.returncode:
        said = " ".join(_text(done.stderr).split())
        raise GitError(f"git {arguments[0]} in {root}: {said or f'exit {done.returncode}'}")
    return _text(done.stdout).strip()


def try_git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it failed, for example outside of a repository.

    Raises:
        GitError: git is missing.
    """
    done = call_git(root, *arguments)
    return _text(done.stdout).strip() if done.returncode == 0 else None


def file_at(root: Path, revision: str, path: str) -> bytes | None:
    """Return the bytes of a file in a commit, by its path below `root`; None if the commit lacks it.

    Raises:
        GitError: git is missing.
    """
    done = call_git(root, "show", f"{revision}:./{path}")
    return done.stdout if done.returncode == 0 else None


def call_git(
    root: Path, *arguments: str, extra: dict[str, str] | None = None, given: str | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a git command, without checking its exit status.

    Raises:
        GitError: git is missing.
    """
    variables = {**os.environ, "LC_ALL": "C", **(extra or {})}
    if arguments[0] in {"commit", "commit-tree"}:
        variables |= _identity(root)
    try:
        return subprocess.run(
            ["git", "-C", os.fspath(root), *PLAIN, *arguments],
            input=(given or "").encode(errors="surrogateescape"), env=variables, capture_output=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise GitError("git is not installed, and a run is a commit") from None


def person(root: Path) -> str | None:
    """`Name <email>` of the person as whom git commits in a folder; None where they have not told git."""
    name = os.environ.get("GIT_AUTHOR_NAME") or try_git(root, "config", "user.name")
    email = os.environ.get("GIT_AUTHOR_EMAIL") or try_git(root, "config", "user.email")
    return f"{name} <{email}>" if name and email else None


def _identity(root: Path) -> dict[str, str]:
    if os.environ.get("GIT_AUTHOR_EMAIL") or try_git(root, "config", "user.email"):
        return {}
    return {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "Pedigree"), ("EMAIL", "pedigree@localhost"))
    }


def _text(said: bytes) -> str:
    return said.decode(errors="surrogateescape")
