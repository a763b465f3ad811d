"""The ledger: inputs and outputs of each stage. This is the only file that calls DVC's API.

DVC is the record, not the engine: the flow checks whether a stage changed, runs the stage's command, then records the
outputs. `dvc repro` does the same without any server.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import dvc.config
import dvc.exceptions
import dvc.lock
import dvc.ui
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import JSONFileLoader, Loader
from configobj import ConfigObj, ConfigObjError
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo, lock_repo
from dvc.stage import PipelineStage
from dvc.stage.cache import RunCacheNotFoundError, _can_hash, _get_stage_hash
from rich.console import Console

from components.core.errors import DISK_FULL, PedigreeError, ServiceError
from components.core.layout import Layout
from components.lineage.lock_file import content_id, overlap

logging.getLogger("dvc").setLevel(logging.WARNING)  # else it logs each written file
# No bars and spinners of its own on a terminal: the door shows what goes on.
for bars in ("dvc.progress", "dvc_data.callbacks"):
    logging.getLogger(bars).setLevel(logging.CRITICAL)
dvc.ui.ui.error_console = Console(quiet=True, force_terminal=False)


class _ReadOnce(JSONFileLoader):
    """Cache botocore's service descriptions per process, because DVC opens a session for each use of the remote."""

    read: ClassVar[dict[str, Any]] = {}

    def load_file(self, file_path: str) -> Any:
        """Return the parsed file, which is never modified; None if it does not exist."""
        if file_path not in self.read:
            self.read[file_path] = super().load_file(file_path)
        return self.read[file_path]


Loader.FILE_LOADER_CLASS = _ReadOnce
# DVC keeps the current folder and its locks by process: two threads of one process are not kept apart by them.
_ONE_AT_A_TIME = threading.Lock()


class LedgerError(PedigreeError):
    """A ledger operation failed; the message names the file or stage and what to do."""


class LedgerUnreachableError(LedgerError, ServiceError):
    """The remote storage did not answer or the repository is locked; a retry may succeed."""


class Outcome(Enum):
    """Status of a stage before it runs."""

    UNCHANGED = "unchanged"  # recorded in dvc.lock, with outputs in place
    RESTORED = "restored"  # computed from the same inputs by an earlier run on any branch
    CHANGED = "changed"  # must run


@dataclass(frozen=True)
class Stage:
    """One stage of `dvc.yaml`, with `foreach` expanded; `needs` are the stages on which it depends."""

    name: str
    command: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Foreseen:
    """What a run would do with a stage.

    Attributes:
        stage: name, as in `Stage`.
        outcome: RESTORED or CHANGED, as far as the inputs are known.
        waits: required stages whose outputs are not in place.
        here: whether its final outputs are in place.
        inputs: future entry of `dvc.lock`: `cmd`, `params`, and `deps` with DVC ids, None if unknown.
    """

    stage: str
    outcome: Outcome
    waits: tuple[str, ...]
    here: bool
    inputs: dict[str, Any]


@dataclass(frozen=True)
class RecordedOutput:
    """An output of a stage in `dvc.lock`.

    Attributes:
        path: of the file or folder.
        dvc: its id.
        files: md5 by path inside the folder, of a file under the empty path; None if the listing is gone.
        report: whether it is a metric, a plot or a page, which may hold times.
    """

    path: str
    dvc: str
    files: Mapping[str, str] | None
    report: bool


class Ledger:
    """DVC's record of one workspace.

    Args:
        root: folder with `dvc.yaml`, `.dvc` and `params.yaml`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stages(self) -> list[Stage]:
        """Return all stages of `dvc.yaml` in topological order."""
        with self._repo() as repo:
            return [stage for _, stage in self._in_order(repo)]

    def take_up(self, name: str) -> Outcome:
        """Restore a stage's outputs if they are recorded for the present inputs; else delete them for a run."""
        with self._repo() as repo:
            stage = self._stage(repo, name)
            if not stage.changed():
                return Outcome.UNCHANGED
            stage.remove_outs(ignore_remove=False)  # DVC does not overwrite untracked files
            try:
                repo.stage_cache.restore(stage, run_cache=True, pull=self._has_remote(repo))
            except RunCacheNotFoundError:
                return Outcome.CHANGED
            self._commit(repo, name)
            return Outcome.RESTORED

    def record(self, name: str) -> None:
        """Record a finished stage in `dvc.lock`, and push its outputs and run-cache entry to the remote.

        Raises:
            LedgerError: an output is missing or contradicts `dvc.yaml`.
            LedgerUnreachableError: the remote does not answer.
        """
        with self._repo() as repo:
            self._commit(repo, name)
        self.push(name)

    def push(self, name: str) -> None:
        """Push a recorded stage's outputs and its run-cache entry to the remote."""
        with self._repo() as repo:
            if not self._has_remote(repo):
                return
            repo.push(targets=[name])
            stage = self._stage(repo, name)
            remote = repo.cloud.get_remote_odb(hash_name="md5-dos2unix")
            folder = Path(repo.stage_cache._get_cache_dir(_get_stage_hash(stage)))
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            # Outputs in git (`cache: false`) are not pushed, but restoring the stage elsewhere requires them.
            for objects in repo.stage_cache.get_used_objs((e.parent.name, e.name) for e in entries).values():
                if repo.cloud.push(objects).failed:
                    raise LedgerUnreachableError(f"DVC remote: outputs of {name} were not all sent")
            for entry in entries:
                target = "/".join((remote.path, *entry.relative_to(repo.cache.legacy.path).parts))
                remote.fs.put_file(os.fspath(entry), target)

    def foresee(self, helper: str | None = None) -> list[Foreseen]:
        """Predict what a run in this workspace would do with each stage, from the local cache alone.

        Tracked data and cached outputs are checked out; nothing is recorded, pushed or fetched.

        Args:
            helper: a quick stage that is run if it changed, because others depend on its outputs.

        Raises:
            LedgerError: tracked data is not in the cache, or the helper failed; the message has its last line.
        """
        found: dict[str, Foreseen] = {}
        outputs: dict[str, tuple[str, ...]] = {}
        with self._repo() as repo:
            self._place_data(repo, fetch=False)
            for stage, known in self._in_order(repo):
                waits = tuple(name for name in known.needs if not found[name].here)
                outcome, here = (Outcome.CHANGED, False) if waits else self._restore_here(repo, stage)
                if known.name == helper and not here:
                    self._run_helper(known)
                    here = True
                unsure = [path for name in waits for path in outputs[name]]
                found[known.name] = Foreseen(known.name, outcome, waits, here, _inputs(stage, unsure))
                outputs[known.name] = known.outputs
        return list(found.values())

    def adopt(self, name: str, entry: dict[str, Any]) -> None:
        """Record the outputs of a stage's old `dvc.lock` entry for the present inputs, also for later runs.

        Raises:
            LedgerError: the outputs are neither in the cache nor on the remote.
        """
        with self._repo() as repo:
            stage = self._stage(repo, name)
            made = repo.stage_cache._create_stage(entry, wdir=stage.wdir)
            if self._has_remote(repo):
                for objects in made.get_used_objs().values():
                    repo.cloud.pull(objects)
            if not made.outs_cached():
                raise LedgerError(
                    f"{name}: its recorded outputs are neither in the DVC cache nor on the remote; run it"
                )
            stage.remove_outs(ignore_remove=False)
            made.checkout()
            self._commit(repo, name)

    def fetch_run_cache(self) -> None:
        """Fetch the remote's run cache, the index of stages that other machines finished."""
        with self._repo() as repo:
            if self._has_remote(repo):
                remote = repo.cloud.get_remote_odb(hash_name="md5-dos2unix")
                repo.stage_cache.transfer(remote, repo.cache.legacy, force=False)

    def track(self, path: Path) -> str:
        """Track a data folder with `dvc add` and push it; return its DVC id (`<md5>.dir`)."""
        with self._repo() as repo:
            stage: Any = repo.add(os.fspath(path))[0]  # pyright: ignore[reportArgumentType]
            self._check_cached(repo, stage)
            if self._has_remote(repo):
                repo.push(targets=[stage.addressing])
            return str(stage.outs[0].hash_info.value)

    def untrack(self, tracked_by: Path) -> None:
        """Untrack a data folder: delete its `.dvc` file, the folder and its git rule, but not its objects."""
        with self._repo() as repo:
            repo.remove(os.fspath(tracked_by.relative_to(self.root)), outs=True)

    def bring_data(self) -> int:
        """Check out every tracked data folder (`*.dvc`), fetching missing objects; return their number."""
        with self._repo() as repo:
            return self._place_data(repo, fetch=True)

    def bring_inputs(self, name: str) -> None:
        """Check out what a recorded stage reads, fetching missing objects, and compare its bytes with their ids.

        Raises:
            LedgerError: bytes are gone or changed, or the commit has other inputs than its record of the stage.
        """
        with self._repo() as repo:
            stage = self._stage(repo, name)
            read = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            others = (out for other in repo.index.stages if other is not stage for out in other.outs if out.use_cache)
            outs: dict[str, Any] = {os.path.relpath(out.fs_path, repo.root_dir): out for out in others}
            needed = {path: out for path, out in outs.items() if any(overlap(path, other) for other in read)}
            self._fetch(repo, needed)
            repo.checkout(targets=list(needed), force=True)
            for path, out in needed.items():
                if content_id(self.root / path) != out.hash_info.value:
                    raise LedgerError(
                        f"{path}: not the bytes that are recorded ({out.hash_info.value}); `pedigree verify`"
                    )
            if stage.changed_deps():
                raise LedgerError(
                    f"{name}: dvc.lock records it with other inputs than this commit has; see `dvc status`"
                )

    def recorded_outputs(self, name: str) -> list[RecordedOutput]:
        """Return what `dvc.lock` records as a stage's outputs; listings of folders are fetched."""
        with self._repo() as repo:
            return [_recorded_output(out) for out in self._stage(repo, name).outs if out.hash_info]

    def remote_address(self) -> str:
        """Return the address of the remote, once it has answered; do not wait for locks.

        Raises:
            LedgerError: there is no remote, or it refused.
            LedgerUnreachableError: it does not answer.
        """
        with self._repo(locked=False) as repo:
            if not self._has_remote(repo):
                raise LedgerError("DVC has no remote; `dvc remote add --default storage s3://BUCKET/dvc` names one")
            remote = repo.cloud.get_remote()
            remote.fs.exists(remote.path)
            return remote.fs.unstrip_protocol(remote.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock this workspace against other uses of DVC, such as ingest and the `dvc` command."""
        lock = self._repo()
        lock.__enter__()
        try:
            yield  # errors of the block are not DVC's
        finally:
            lock.__exit__(None, None, None)

    def share_cache(self, checkout: Path) -> None:
        """Use the checkout's cache and local remote settings (endpoint, credentials) in this workspace."""
        settings, local = (Layout(root).dvc_local_settings for root in (checkout, self.root))
        local.parent.mkdir(exist_ok=True)
        if settings.exists():
            shutil.copy(settings, local)
        try:  # not with DVC, which writes ASCII only
            config: Any = ConfigObj(os.fspath(local), encoding="utf-8", interpolation=False)
        except ConfigObjError as error:
            raise LedgerError(f"{settings} cannot be read ({error}); mend or delete it") from None
        config.setdefault("cache", {})["dir"] = os.fspath(Layout(checkout).dvc_cache)
        config.write()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Block other uses of the ledger in this process, so that `dvc.lock` is complete and does not change."""
        with _ONE_AT_A_TIME:
            yield

    def _in_order(self, repo: Repo) -> list[tuple[Any, Stage]]:
        """Return all stages in topological order, each as DVC's object and ours."""
        graph = repo.index.graph  # edges go from a stage to what it depends on
        names: dict[Any, str] = {s: str(s.addressing) for s in graph.nodes if isinstance(s, PipelineStage)}
        result, done = [], set()

        def visit(stage: Any) -> None:
            if stage in done or stage not in names:
                return
            done.add(stage)
            needed = sorted((s for s in graph.successors(stage) if s in names), key=names.__getitem__)
            for other in needed:
                visit(other)
            outs = tuple(out.def_path for out in stage.outs)
            result.append((stage, Stage(names[stage], stage.cmd, tuple(names[s] for s in needed), outs)))

        for stage in sorted(names, key=names.__getitem__):
            visit(stage)
        return result

    def _place_data(self, repo: Repo, fetch: bool) -> int:
        targets = [s.addressing for s in repo.index.stages if not isinstance(s, PipelineStage)]
        if not targets:
            return 0
        missing = [s for s in repo.index.stages if s.addressing in targets and not s.outs_cached()]
        if missing and fetch and self._has_remote(repo):
            repo.fetch(targets=[s.addressing for s in missing])
        if lost := [str(s.outs[0]) for s in missing if not s.outs_cached()]:
            raise LedgerError(
                f"{lost[0]}: its bytes are neither in the DVC cache nor on the remote; take the remote that has "
                f"them (AWS_ENDPOINT_URL), or delete {lost[0]}.dvc and ingest the source again"
                if fetch
                else f"{lost[0]}: its bytes are not in this machine's DVC cache; `dvc pull {lost[0]}` fetches them"
            )
        repo.checkout(targets=targets, force=True)
        return len(targets)

    def _fetch(self, repo: Repo, outs: dict[str, Any]) -> None:
        """Fetch the outputs, by path, that are not in the cache.

        Raises:
            LedgerError: some are neither there nor on the remote.
        """
        missing = [path for path, out in outs.items() if out.changed_cache()]
        if missing and self._has_remote(repo):
            with suppress(dvc.exceptions.DownloadError):  # of objects that the remote lacks too
                repo.fetch(targets=missing)
        if lost := [path for path in missing if outs[path].changed_cache()]:
            raise LedgerError(
                f"{lost[0]}: its bytes are neither in the DVC cache nor on the remote; they were purged or removed, or "
                "lie on another remote (AWS_ENDPOINT_URL)"
            )

    def _restore_here(self, repo: Repo, stage: Any) -> tuple[Outcome, bool]:
        """Restore a stage's outputs from the local cache; return the outcome, and whether they are in place."""
        try:
            repo.stage_cache.restore(stage, run_cache=True, pull=False)
        except RunCacheNotFoundError:
            known = _can_hash(stage) and repo.stage_cache._load(stage)
            return (Outcome.RESTORED if known else Outcome.CHANGED), False
        return Outcome.RESTORED, True

    def _run_helper(self, stage: Stage) -> None:
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
        done = subprocess.run(
            shlex.split(stage.command), cwd=self.root, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
            raise LedgerError(said.removeprefix("error: "))

    def _commit(self, repo: Repo, name: str) -> None:
        repo.commit(target=name, force=True)
        repo._reset()
        self._check_cached(repo, self._stage(repo, name))

    def _check_cached(self, repo: Repo, stage: Any) -> None:
        """Check the cache after a commit, because DVC only logs failed cache writes, such as on a full disk.

        Raises:
            LedgerError: the cache lacks some of the stage's outputs.
        """
        if not stage.outs_cached():
            raise LedgerError(
                f"{stage.addressing}: its files are not all in the DVC cache {repo.cache.local.path}: see whether its "
                "disk is full or read-only, then run again"
            )

    def _stage(self, repo: Repo, name: str) -> Any:
        return next(iter(repo.stage.collect(name)))

    def _has_remote(self, repo: Repo) -> bool:
        return bool(repo.config["core"].get("remote"))

    @contextmanager
    def _repo(self, locked: bool = True) -> Iterator[Repo]:
        try:
            with (
                _ONE_AT_A_TIME,
                _inside(self.root),
                Repo(os.fspath(self.root), _wait_for_lock=True) as repo,
                lock_repo(repo) if locked else nullcontext(),
            ):
                yield repo
        except dvc.exceptions.NotDvcRepoError:
            raise LedgerError(f"{self.root}: not a DVC repository; run `dvc init` there or use a full clone") from None
        except (dvc.exceptions.UploadError, dvc.exceptions.DownloadError, dvc.lock.LockError) as error:
            raise LedgerUnreachableError(f"DVC: {_one_line(error)}") from error
        except (dvc.exceptions.DvcException, dvc.config.ConfigError) as error:
            raise LedgerError(f"DVC: {_one_line(error)}") from error
        except (OSError, BotoCoreError, ClientError) as error:
            if getattr(error, "errno", None) in DISK_FULL:
                where = getattr(error, "filename", None) or f"the DVC cache of {self.root}"
                raise LedgerError(f"DVC: {where}: no space left on the disk; free some, then run again") from error
            refused = isinstance(error, ClientError | PermissionError)
            raise (LedgerError if refused else LedgerUnreachableError)(f"DVC remote: {_one_line(error)}") from error


def _recorded_output(out: Any) -> RecordedOutput:
    dvc_id, path = str(out.hash_info.value), str(out.def_path)
    files: dict[str, str] | None = {"": dvc_id}
    if out.is_dir_checksum:
        listing = out.get_dir_cache()
        files = None if listing is None else {"/".join(key): found.value for key, _, found in listing}
    return RecordedOutput(path, dvc_id, files, bool(out.metric or out.plot or path.endswith(".html")))


def _inputs(stage: Any, unsure: list[str]) -> dict[str, Any]:
    """Return command, parameters and DVC ids of inputs; None for a missing input, or one that overlaps `unsure`."""
    params: dict[str, Any] = {}
    deps: dict[str, Any] = {}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            params |= dep.read_params()
        else:
            known = dep.exists and not any(overlap(dep.def_path, path) for path in unsure)
            deps[dep.def_path] = dep.get_hash().value if known else None
    return {"cmd": stage.cmd, "params": params, "deps": deps}


@contextmanager
def _inside(root: Path) -> Iterator[None]:
    """Set `root` as the current folder inside the block, because DVC resolves stage addresses against it."""
    before = Path.cwd()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)


def _one_line(error: BaseException) -> str:
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 3:
        text = " ".join(str(current).split())
        if text and not any(text in p for p in parts):
            parts.append(text)
        current = current.__cause__
    return ": ".join(parts) or type(error).__name__
