"""A run's own folder: a git worktree on branch `runs/<run-id>` that shares the checkout's DVC cache.

A run is a commit: the checkout's code and configuration (uncommitted edits too) and the run's `params.yaml` become
the first commit of the branch; each finished stage adds one. The checkout itself is never touched.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import yaml

from components.core.config import parse_yaml
from components.core.git import git, try_git
from components.core.layout import RELATIVE, Layout
from components.core.locks import try_lock, wait_for_lock
from components.lineage.anchors import set_anchor
from components.recipe import PARAMS_FILE, Recipe
from flows import run_events
from flows.gc_lock import no_gc_beside
from flows.git import head_commit
from flows.snapshot import by_top_level, describe, snapshot
from flows.sources import COLLECTIONS

if TYPE_CHECKING:  # importing DVC is slow
    from components.lineage.ledger import Ledger

logger = logging.getLogger(__name__)

ENDS = ("Run finished", "Run failed", "Run interrupted")  # prefixes of the subject of a branch's last commit
KEPT_FOLDERS = 3  # of the newest finished runs, for inspection; all branches are kept


@dataclass(frozen=True)
class Workspace:
    """Workspace of one run."""

    root: Path
    run_id: str
    ledger: Ledger
    logged: set[str] = field(default_factory=set, compare=False)  # stray files already logged

    @property
    def branch(self) -> str:
        """The git branch that is the run's record."""
        return f"runs/{self.run_id}"

    def commit(self, message: str) -> str:
        """Commit `dvc.lock` and outputs that DVC does not cache; return the commit."""
        with self.ledger.at_rest():  # else a concurrent stage may be writing `dvc.lock` or hold the index
            said = git(self.root, "ls-files", "-z", "--modified", "--others", "--exclude-standard")
            changed = sorted(set(filter(None, said.split("\0"))))
            recorded = _recorded_outputs(self.root)
            left = [path for path in changed if _for_git(path, recorded)]
            if left:
                given = "".join(f"{path}\0" for path in left)
                git(self.root, "update-index", "--add", "--remove", "-z", "--stdin", given=given)
            if git(self.root, "diff-index", "--cached", "--name-only", "HEAD"):
                git(self.root, "commit", "--quiet", "--no-verify", "--message", message)
            commit = git(self.root, "rev-parse", "HEAD")
        self._log_strays({*changed} - {*left} - self.logged)
        return commit

    def _log_strays(self, paths: set[str]) -> None:
        """Log files that are no stage's output, once; outputs of running stages are not stray."""
        if not paths:
            return
        outputs = {path for stage in self.ledger.stages() for path in stage.outputs}
        for group in by_top_level(sorted(path for path in paths if not _for_git(path, outputs))):
            logger.warning("not committed to %s, no stage's output: %s", self.branch, describe(self.root, group))
            self.logged.update(group)


def close_branch(root: Path, message: str) -> str:
    """Add the closing commit of a run, unless there is one; set the anchor of the branch, and return its last commit.

    The closing commit holds the heads of the audit log.

    Args:
        root: the run's folder.
        message: starts with one of `ENDS`.
    """
    if not git(root, "show", "-s", "--format=%s", "HEAD").startswith(ENDS):
        one_line = " ".join(message.split())[:1000]
        body = ["--message", "\n".join(anchors)] if (anchors := run_events.ended(root, one_line)) else []
        git(root, "commit", "--quiet", "--no-verify", "--allow-empty", "--message", one_line, *body)
    commit, branch = git(root, "rev-parse", "HEAD", "--abbrev-ref", "HEAD").splitlines()
    set_anchor(root, branch.removeprefix("runs/"), commit)
    return commit


@contextmanager
def open_workspace(checkout: Path, recipe: Recipe, sources: Sequence[str]) -> Iterator[Workspace]:
    """Create a run's worktree with the given snapshots (SOURCE/SNAPSHOT); the folder is kept after the block.

    Raises:
        WorkspaceError: not a git repository, or one without a commit.
    """
    from components.lineage.ledger import Ledger

    layout = Layout(checkout)
    runs = layout.runs
    runs.mkdir(parents=True, exist_ok=True)
    head_commit(checkout)
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with no_gc_beside(checkout), (runs / f"{run_id}.lock").open("w") as lock:
        wait_for_lock(lock)
        _remove_old(checkout, runs)
        commit = snapshot(checkout, params_text(checkout, recipe), sources, f"Run {run_id}")
        root = runs / run_id
        git(checkout, "worktree", "add", "--quiet", "-b", f"runs/{run_id}", os.fspath(root), commit)
        Layout(root).state.symlink_to(layout.state)
        ledger = Ledger(root)
        ledger.share_cache(checkout)
        for collection in COLLECTIONS:
            (root / collection).mkdir(parents=True, exist_ok=True)
        yield Workspace(root, run_id, ledger)


def params_text(checkout: Path, recipe: Recipe) -> str:
    """Return the text of a run's `params.yaml`: the checkout's if its values are equal, else the given values."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    own = checkout / PARAMS_FILE
    if own.exists() and parse_yaml(own.read_text()) == values:
        return own.read_text()
    return yaml.safe_dump(values, sort_keys=False)


def _recorded_outputs(root: Path) -> set[str]:
    lock = Layout(root).dvc_lock
    stages = ((parse_yaml(lock.read_text()) or {}).get("stages") or {}) if lock.exists() else {}
    return {out["path"] for stage in stages.values() for out in stage.get("outs", ())}


def _for_git(path: str, outputs: set[str]) -> bool:
    """Return whether a file is written by DVC for git or belongs to outputs (cached outputs are ignored by git)."""
    written_by_dvc = path == str(RELATIVE.dvc_lock) or path.rpartition("/")[2] == ".gitignore"
    return written_by_dvc or not outputs.isdisjoint([path, *map(str, PurePosixPath(path).parents)])


def _remove_old(checkout: Path, runs: Path) -> None:
    """Remove the folders of all but the newest finished runs; active runs hold their lock."""
    finished = []
    for path in sorted(runs.glob("*.lock")):
        with path.open("w") as lock:
            if try_lock(lock):
                finished.append(path)
    for path in finished[: -KEPT_FOLDERS or None]:
        try_git(checkout, "worktree", "remove", "--force", os.fspath(path.with_suffix("")))
        path.unlink()
    try_git(checkout, "worktree", "prune")
