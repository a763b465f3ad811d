"""Run stages of a run again in a worktree of their own, and compare their outputs with the recorded ones.

No earlier result of this machine is used: the worktree has an empty state folder, so that a training finds neither
checkpoints nor results. Nothing is recorded, and nothing remains.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from components.core.config import ConfigError
from components.core.git import git, try_git
from components.core.layout import Layout
from components.core.locks import exclusive
from components.core.machine import MACHINE
from components.core.mlflow_client import checked_client, reported
from components.core.model_files import differing
from components.core.references import URI, ModelReference
from components.lineage.claims import mlflow_runs
from components.lineage.ledger import Ledger, RecordedOutput
from components.lineage.lock_file import Record, RecordError, content_id, file_md5, find_record
from components.lineage.provenance import Tag
from components.lineage.runs import find_runs, stage_ends
from components.lineage.trace import find_version
from flows.console import board
from flows.gc_lock import no_gc_beside
from flows.sources import COLLECTIONS
from flows.stages import hand_on, stream

log = logging.getLogger(__name__)

STAGES = ("curate", "pretrain", "adapt", "distill")  # without a choice
REGISTERS = "register"
SERVER = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")


@dataclass(frozen=True)
class Output:
    """An output of a stage, compared.

    Attributes:
        path: of the file or folder.
        differing: its files that differ, are missing or are new; the path itself where the recorded files are unknown.
        report: a metric, plot or page, which may hold times and does not decide.
    """

    path: str
    differing: tuple[str, ...]
    report: bool


@dataclass(frozen=True)
class Reproduction:
    """A stage that ran again.

    Attributes:
        stage: its name.
        seconds: that it took.
        outputs: compared with the recorded ones.
        reasons: why they may differ; empty where they are equal.
    """

    stage: str
    seconds: float
    outputs: tuple[Output, ...]
    reasons: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every output but reports is equal, byte for byte."""
        return not any(output.differing for output in self.outputs if not output.report)


def find_recorded(asked: str, checkout: Path) -> Record:
    """Find the commit with the complete `dvc.lock` of a run, or of the run that made a registered version.

    Raises:
        ConfigError: neither a run nor a reference of a version; or the run has not ended.
        RecordError: the version's commit is not in this clone.
    """
    run = next((run for run in find_runs(checkout) if run.id == asked.removeprefix("runs/")), None)
    if run is not None and run.locked:
        raise ConfigError(f"{asked}: the run has not ended")
    if run is not None and run.commits:
        return Record(checkout, run.tip)
    if ModelReference.parse(asked.removeprefix(URI)) is None:
        raise ConfigError(f"{asked}: no run here (`pedigree runs` lists them), and no NAME@ALIAS or NAME/NUMBER")
    tags = find_version(asked, checkout).tags
    commit = tags.get(Tag.COMMIT, "(none)")
    record = find_record(checkout, commit, tags.get(Tag.LOCK_SHA256))
    if record is None:
        raise RecordError(
            f"{asked}: its commit {commit} is not in this clone; fetch {tags.get(Tag.BRANCH, 'its branch')}"
        )
    return record


def choose_stages(record: Record, stage: str | None) -> list[str]:
    """Return the stages to run again, those that took less time first.

    Args:
        record: of the run.
        stage: the only one; None: curation and all trainings.

    Raises:
        ConfigError: the run has no such stage; or the one that registers, which is never run again.
    """
    recorded = list(record.stages())
    if stage == REGISTERS:
        raise ConfigError(f"--stage {stage}: would register another version; choose from {', '.join(recorded)}")
    chosen = [name for name in recorded if (name in STAGES if stage is None else name == stage)]
    if not chosen:
        asked = f"none of {', '.join(STAGES)}" if stage is None else f"no stage {stage!r}"
        raise ConfigError(f"the run recorded {asked}; name one by --stage: {', '.join(recorded)}")
    ends = stage_ends(record.root, str(record.revision))
    seconds = {name: end.seconds for name, end in ends.items() if end.seconds is not None}
    order = {name: place for place, name in enumerate(STAGES)}
    return sorted(chosen, key=lambda name: (seconds.get(name, float("inf")), order.get(name, 0)))


def reproduce(record: Record, stages: Sequence[str], checkout: Path) -> Iterator[Reproduction]:
    """Run stages of a run again, one after the other, and compare the outputs of each.

    Raises:
        LedgerError: inputs are gone or changed, or were not those of the stage.
        StageFailedError: a stage failed.
        TrackingError: a stage reads a registered model, and MLflow does not answer.
    """
    ends = stage_ends(record.root, str(record.revision))
    with _worktree(record, checkout) as root:
        ledger = Ledger(root)
        ledger.share_cache(checkout)
        board.plan(stages, {})
        for stage in stages:
            took = ends[stage].seconds if stage in ends else None
            log.info("%s: runs again%s", stage, "" if took is None else f"; it took {took} s in the run")
            yield _reproduce(stage, record, ledger)


def _reproduce(stage: str, record: Record, ledger: Ledger) -> Reproduction:
    entry = record.stages()[stage]
    with board.working(stage, "bringing its inputs"):
        ledger.bring_inputs(stage)
        recorded = ledger.recorded_outputs(stage)
        _clear(recorded, ledger.root)
        begun = time.monotonic()
        with _tracking_off(entry, ledger.root):
            stream(entry["cmd"], ledger.root, partial(hand_on, stage, log, lambda _: None))
    outputs = tuple(_compare(output, ledger.root) for output in recorded)
    made = Reproduction(stage, time.monotonic() - begun, outputs, ())
    if not made.equal:
        reasons = tuple(_reasons(_machine(record, stage), _machine(Record(ledger.root), stage)))
        made = dataclasses.replace(made, reasons=reasons)
    _clear(recorded, ledger.root)  # a later stage reads the recorded ones
    return made


def _compare(recorded: RecordedOutput, root: Path) -> Output:
    path = root / recorded.path
    if recorded.files is None:
        equal = path.exists() and content_id(path) == recorded.dvc
        return Output(recorded.path, () if equal else (recorded.path,), recorded.report)
    files = [path, *path.rglob("*")]
    found = {file.relative_to(path).as_posix(): file_md5(file) for file in files if file.is_file()}
    names = differing({name or ".": md5 for name, md5 in recorded.files.items()}, found)
    return Output(
        recorded.path, tuple((PurePosixPath(recorded.path) / name).as_posix() for name in names), recorded.report
    )


def _reasons(recorded: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    """Why outputs of the same inputs may differ."""
    if recorded is None or now is None:
        yield "the stage did not record its machine: another processor, thread count or library cannot be ruled out"
        return
    differing = [key for key in recorded if recorded[key] != now.get(key)]
    for key in differing:
        yield f"another {key}: {recorded[key]} in the run, {now.get(key)} now"
    if not differing:
        yield "processor, threads and libraries are those of the run: the stage is not deterministic"


def _machine(record: Record, stage: str) -> Mapping[str, Any] | None:
    name, _, item = stage.partition("@")
    text = record.read(str(Layout().result(name, item or None)))
    found = json.loads(text) if text else None
    return found.get(MACHINE) if isinstance(found, dict) else None


@contextmanager
def _worktree(record: Record, checkout: Path) -> Iterator[Path]:
    """A worktree at the run's commit, with a state folder of its own; one at a time in a checkout."""
    folder = Layout(checkout).state / "reproduce"
    told = "another `pedigree reproduce` is working in this checkout; this one starts when it has ended"
    with no_gc_beside(checkout), exclusive(folder.with_suffix(".lock"), lambda _: log.warning(told)):
        _remove(checkout, folder)  # leftovers of a killed process
        git(checkout, "worktree", "add", "--quiet", "--detach", os.fspath(folder), str(record.revision))
        try:
            Layout(folder).state.mkdir(exist_ok=True)
            for collection in COLLECTIONS:
                (folder / collection).mkdir(parents=True, exist_ok=True)
            yield folder
        finally:
            _remove(checkout, folder)


def _remove(checkout: Path, folder: Path) -> None:
    try_git(checkout, "worktree", "remove", "--force", os.fspath(folder))
    shutil.rmtree(folder, ignore_errors=True)
    try_git(checkout, "worktree", "prune")


def _clear(outputs: Sequence[RecordedOutput], root: Path) -> None:
    """Delete a stage's outputs, also those that git has brought."""
    for path in (root / output.path for output in outputs):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


@contextmanager
def _tracking_off(entry: Mapping[str, Any], root: Path) -> Iterator[None]:
    """Keep a stage from logging to MLflow; if it reads a registered model it must, and what it logged is deleted."""
    if URI in json.dumps(entry.get("params", {})):
        try:
            yield
        finally:
            _delete_logged(root)
        return
    before = {name: os.environ.pop(name, None) for name in SERVER}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _delete_logged(root: Path) -> None:
    """Delete the MLflow runs of stages in a worktree without branch, which are named after its commit."""
    name = yaml.safe_load(Layout(root).params.read_text())["name"]
    client, commit = checked_client(), git(root, "rev-parse", "HEAD")
    for run in mlflow_runs(client, [name], f"tags.`pedigree.run` = '{commit[:12]}'"):
        with reported():
            client.delete_run(run.info.run_id)
