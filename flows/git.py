"""Check the checkout's git repository for a run."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.errors import PedigreeError
from components.core.git import call_git, try_git
from components.lineage.anchors import ANCHORS
from components.lineage.runs import BRANCHES

Logger = logging.Logger | logging.LoggerAdapter[Any]
PUSHED = (BRANCHES, ANCHORS)
TRY_AGAIN_SECONDS = (1.0, 4.0)
TRANSIENT = re.compile(r"Could not resolve|[Tt]imed out|unable to access|Connection|hung up|early EOF|cannot lock ref")
# Never ask: a run has no terminal, or nobody looks at it.
UNASKED = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10"}


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


def push_runs(checkout: Path, logger: Logger) -> bool:
    """Push all run branches and anchors to the checkout's git remote, and log it if it does not have them all.

    Runs that an earlier push did not deliver are pushed too. Nothing is overwritten on the remote.

    Returns:
        Whether the remote has all runs.
    """
    remote = _remote(checkout)
    if remote is None:
        logger.info("the record of the runs is only in %s, which has no git remote to push their branches to", checkout)
        return False
    refspecs = [f"{pattern}*:{pattern}*" for pattern in PUSHED]
    extra = {name: os.environ.get(name, value) for name, value in UNASKED.items()}
    for seconds in (*TRY_AGAIN_SECONDS, None):
        done = call_git(checkout, "push", "--quiet", "--no-verify", remote, *refspecs, extra=extra)
        if done.returncode == 0:
            return True
        said = " ".join(done.stderr.decode(errors="replace").split())
        if seconds is None or not TRANSIENT.search(said):
            break
        time.sleep(seconds)
    by_hand = f"git push {remote} " + " ".join(f"'{refspec}'" for refspec in refspecs)
    logger.warning("git remote %s lacks runs (%s); the next run pushes them again, or `%s`", remote, said, by_hand)
    return False


def _remote(checkout: Path) -> str | None:
    """Return git's `remote.pushDefault`, else `origin`, else the first remote; None without any."""
    names = (try_git(checkout, "remote") or "").splitlines()
    default = try_git(checkout, "config", "remote.pushDefault")
    return default or ("origin" if "origin" in names else next(iter(names), None))
