"""Predict what a run would do, in a worktree of its snapshot, from the local cache alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from components.core.git import git, try_git
from components.core.layout import RELATIVE, Layout
from components.core.locks import exclusive
from components.lineage.changes import Change, changes
from components.lineage.code import STAGE as CODE_STAGE
from components.lineage.ledger import Foreseen, Ledger, Outcome
from components.lineage.lock_file import Record, RecordError
from components.recipe import PARAMS_FILE, Recipe
from flows.gc_lock import no_gc_beside
from flows.snapshot import snapshot
from flows.sources import COLLECTIONS
from flows.workspace import ENDS, params_text

BRANCHES = "refs/heads/runs/"


@dataclass(frozen=True)
class Step:
    """What a run would do with one stage.

    Attributes:
        stage: its name.
        outcome: `run`; `unchanged` since the last run; `restored` from an earlier one; `after`: its inputs are computed
            again, and it runs unless they are equal.
        after: the stages whose outputs will be computed or fetched first.
        changes: differences from the last run.
    """

    stage: str
    outcome: str
    after: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Preview:
    """A temporary worktree equal to that of a run.

    Attributes:
        ledger: of the worktree.
        last: record of the last finished run of the same model; None if there is none.
        steps: all stages except bookkeeping, in topological order.
    """

    ledger: Ledger
    last: Record | None
    steps: list[Step]

    @property
    def last_run(self) -> str | None:
        """Id of the last finished run."""
        return self.last.revision.removeprefix("runs/") if self.last and self.last.revision else None


@contextmanager
def open_preview(checkout: Path, recipe: Recipe, sources: Sequence[str]) -> Iterator[Preview]:
    """Snapshot the checkout as a run does, and predict what each stage would do.

    Raises:
        WorkspaceError: not a git repository, or one without a commit.
        LedgerError: data of the pool is not on this machine, or the code is unreadable.
    """
    layout = Layout(checkout)
    folder = layout.state / "preview"
    folder.parent.mkdir(exist_ok=True)
    with no_gc_beside(checkout), exclusive(folder.with_suffix(".lock")):
        _remove(checkout, folder)  # leftovers of a killed process
        commit = snapshot(checkout, params_text(checkout, recipe), sources, "Preview of a run")
        git(checkout, "worktree", "add", "--quiet", "--detach", os.fspath(folder), commit)
        try:
            ledger = Ledger(folder)
            ledger.share_cache(checkout)
            for collection in COLLECTIONS:
                (folder / collection).mkdir(parents=True, exist_ok=True)
            last = last_run(checkout, recipe.name)
            yield Preview(ledger, last, _steps(ledger, last))
        finally:
            _remove(checkout, folder)


def last_run(checkout: Path, name: str) -> Record | None:
    """Return the newest finished run of the model `name`: its `dvc.lock` has all stages of its `dvc.yaml`."""
    listed = git(checkout, "for-each-ref", "--format=%(refname:short) %(subject)", "--sort=-refname", BRANCHES)
    branches = (line.partition(" ") for line in listed.splitlines())
    ended = (Record(checkout, branch) for branch, _, subject in branches if not subject.startswith(ENDS[1:]))
    return next((record for record in ended if _finished(record, name)), None)


def _finished(record: Record, name: str) -> bool:
    params = yaml.safe_load(record.read(PARAMS_FILE) or b"") or {}
    if params.get("name") != name:
        return False
    named = (yaml.safe_load(record.read(str(RELATIVE.pipeline)) or b"") or {}).get("stages", {})
    try:
        return named.keys() <= {stage.partition("@")[0] for stage in record.stages()}
    except RecordError:
        return False


def _steps(ledger: Ledger, last: Record | None) -> list[Step]:
    entries = last.stages() if last else {}
    steps = []
    for seen in ledger.foresee(CODE_STAGE):
        if seen.stage == CODE_STAGE:
            continue
        if last is None or seen.stage not in entries:
            differences = [Change("record", f"{'the last run has no such stage' if last else 'no run yet'}")]
            steps.append(Step(seen.stage, _outcome(seen, differences), seen.waits, tuple(differences)))
            continue
        differences = changes(entries[seen.stage], seen.inputs, last, Record(ledger.root))
        if not differences and not seen.waits and seen.outcome is Outcome.CHANGED:
            differences = [Change("record", "its outputs are no longer in this machine's cache")]
        steps.append(Step(seen.stage, _outcome(seen, differences), seen.waits, tuple(differences)))
    return steps


def _outcome(seen: Foreseen, differences: list[Change]) -> str:
    if seen.waits:
        return "run" if differences else "after"
    if seen.outcome is Outcome.CHANGED:
        return "run"
    return "restored" if differences else "unchanged"


def _remove(checkout: Path, folder: Path) -> None:
    try_git(checkout, "worktree", "remove", "--force", os.fspath(folder))
    shutil.rmtree(folder, ignore_errors=True)
    try_git(checkout, "worktree", "prune")
