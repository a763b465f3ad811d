"""A run's own folder: a git worktree on branch `runs/<run-id>` that shares the checkout's DVC cache.

A run is a commit: what is in the checkout now (uncommitted edits too) and the run's `params.yaml` become the first
commit of the branch; each finished stage adds one. The checkout itself is never touched.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from components.recipe import PARAMS_FILE, Recipe
from flows.gc_lock import no_gc_beside

if TYPE_CHECKING:  # it loads DVC, which the command line does not wait for
    from components.lineage.ledger import Ledger

COLLECTIONS = ("data/pool", "data/evaluation")
SAMPLE = "sample"  # the source that `make run` builds when there is no other
KEPT_FOLDERS = 3  # of the newest finished runs, to look into; all branches are kept


class WorkspaceError(RuntimeError):
    """The checkout cannot give a run its folder; the message says why and what to do."""


@dataclass(frozen=True)
class Workspace:
    """Where one run works."""

    root: Path
    run_id: str
    ledger: Ledger

    @property
    def branch(self) -> str:
        """The git branch that is the run's record."""
        return f"runs/{self.run_id}"

    def commit(self, message: str) -> str:
        """Commit what git tracks of the run (`dvc.lock`, result files); returns the commit."""
        git(self.root, "add", "--all")
        if git(self.root, "status", "--porcelain"):
            git(self.root, "commit", "--quiet", "--no-verify", "--message", message)
        return git(self.root, "rev-parse", "HEAD")


@contextmanager
def open_workspace(checkout: Path, recipe: Recipe, sources: Sequence[str]) -> Iterator[Workspace]:
    """Make a run's worktree with only the named sources' data in it; the folder stays when the block ends.

    Raises:
        WorkspaceError: not a git repository, or one without a commit.
    """
    from components.lineage.ledger import Ledger

    runs = checkout / ".pedigree" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    head_commit(checkout)
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with no_gc_beside(checkout), (runs / f"{run_id}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_old(checkout, runs)
        commit = snapshot(checkout, params_text(checkout, recipe), sources, f"Run {run_id}")
        root = runs / run_id
        git(checkout, "worktree", "add", "--quiet", "-b", f"runs/{run_id}", os.fspath(root), commit)
        (root / ".pedigree").symlink_to(checkout / ".pedigree")
        ledger = Ledger(root)
        ledger.share_cache(checkout / ".dvc" / "cache", checkout / ".dvc" / "config.local")
        for collection in COLLECTIONS:
            (root / collection).mkdir(parents=True, exist_ok=True)
        yield Workspace(root, run_id, ledger)


def params_text(checkout: Path, recipe: Recipe) -> str:
    """`params.yaml` of a run: the checkout's own text where it says the same, else the values that were given.

    A value that was not given is there too where a stage of `dvc.yaml` names it (`distill.objective`): DVC wants it.
    """
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    every, pipeline = recipe.model_dump(mode="json", by_alias=True), checkout / "dvc.yaml"
    for stage in yaml.safe_load(pipeline.read_text())["stages"].values() if pipeline.exists() else ():
        for name in (stage.get("do") or stage).get("params", ()):
            section, *keys = name.split(".")
            if len(keys) == 1 and section in values:
                values[section].setdefault(keys[0], every[section][keys[0]])
    own = checkout / PARAMS_FILE
    if own.exists() and yaml.safe_load(own.read_text()) == values:
        return own.read_text()
    return yaml.safe_dump(values, sort_keys=False)


def known_sources(checkout: Path) -> list[str]:
    """Names of the sources in the pool, by their `.dvc` files."""
    return sorted({path.parent.name for path in (checkout / "data" / "pool").glob("*/*.dvc")})


def chosen_sources(checkout: Path, asked: Sequence[str] | None) -> list[str]:
    """The sources a run uses: those asked for, else all; the sample only where there is nothing else.

    Raises:
        WorkspaceError: an unknown source, or an empty pool.
    """
    known = known_sources(checkout)
    unknown = sorted(set(asked or ()) - set(known))
    if unknown:
        raise WorkspaceError(f"no source {unknown[0]!r} in the pool; known: {', '.join(known) or 'none'}")
    if not known:
        raise WorkspaceError("the pool is empty: `pedigree ingest FOLDER --name NAME --license LICENSE` fills it")
    return list(asked or [name for name in known if name != SAMPLE] or known)


def head_commit(checkout: Path) -> str:
    """The commit that the checkout is at.

    Raises:
        WorkspaceError: not a git repository, or one without a commit.
    """
    if git(checkout, "rev-parse", "--is-inside-work-tree", check=False) != "true":
        raise WorkspaceError(f"{checkout} is not a git repository, and a run is a commit: `git init`, then commit")
    head = git(checkout, "rev-parse", "--verify", "--quiet", "HEAD", check=False)
    if not head:
        raise WorkspaceError(f"{checkout} has no commit yet, and a run is a commit: `git add -A && git commit`")
    return head


def snapshot(checkout: Path, params: str, sources: Sequence[str], message: str) -> str:
    """Commit the checkout as it is (tracked and new files, never ignored ones) without touching it or its index.

    Of the pool's sources only `sources` are in it; a source that is an evaluation set and nothing else always is.
    """
    head = head_commit(checkout)
    left_out = set(known_sources(checkout)) - set(sources)
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        git(checkout, "read-tree", "HEAD", extra=index)
        git(checkout, "add", "--all", ".", extra=index)
        for path in git(checkout, "ls-files", "--", *COLLECTIONS, extra=index).splitlines():
            if path.endswith(".dvc") and Path(path).parent.name in left_out:
                git(checkout, "rm", "--cached", "--quiet", "--", path, extra=index)
        text = Path(scratch) / PARAMS_FILE
        text.write_text(params)
        blob = git(checkout, "hash-object", "-w", "--no-filters", os.fspath(text))
        git(checkout, "update-index", "--add", "--cacheinfo", f"100644,{blob},{PARAMS_FILE}", extra=index)
        tree = git(checkout, "write-tree", extra=index)
    return git(checkout, "commit-tree", tree, "-p", head, "-m", message)


def git(root: Path, *arguments: str, check: bool = True, extra: dict[str, str] | None = None) -> str:
    """What a git command prints; runs are committed as Pedigree where the user has set no identity.

    Raises:
        WorkspaceError: git is missing or refuses.
    """
    try:
        who = {f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in _identity(root)}
        done = subprocess.run(
            ["git", "-C", os.fspath(root), *arguments],
            capture_output=True, text=True, check=False, env={**os.environ, **who, **(extra or {})},
        )  # fmt: skip
    except FileNotFoundError:
        raise WorkspaceError("git is not installed, and a run is a commit") from None
    if check and done.returncode:
        raise WorkspaceError(f"git {arguments[0]}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
    return done.stdout.strip()


def _identity(root: Path) -> list[tuple[str, str]]:
    asked = ["git", "-C", os.fspath(root), "config", "user.email"]
    known = os.environ.get("GIT_AUTHOR_EMAIL") or subprocess.run(asked, capture_output=True, check=False).stdout
    return [] if known else [("NAME", "Pedigree"), ("EMAIL", "pedigree@localhost")]


def _remove_old(checkout: Path, runs: Path) -> None:
    """Remove the folders of all but the newest finished runs; a run that goes on holds its lock."""
    finished = []
    for path in sorted(runs.glob("*.lock")):
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            finished.append(path)
    for path in finished[: -KEPT_FOLDERS or None]:
        git(checkout, "worktree", "remove", "--force", os.fspath(path.with_suffix("")), check=False)
        path.unlink()
    git(checkout, "worktree", "prune", check=False)
