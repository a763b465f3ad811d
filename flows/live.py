"""Register the flow runs that processes of this checkout execute, to find and close those whose process is gone.

Each flow run has a file in `.pedigree/flow-runs` that its process locks; the kernel releases the lock when the process
ends. `python -m flows.live` closes lost runs, as do the keeper of the local stack and each new run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import psutil

from components.core import stage_runs
from components.core.errors import PedigreeError, ServiceError
from components.core.layout import RELATIVE, Layout
from components.core.locks import try_lock, wait_for_lock
from flows.workspace import close_branch

FOLDER = RELATIVE.state / "flow-runs"
STOP_SECONDS = 60.0
LOST = "its process was killed, or the machine went down"

logger = logging.getLogger(__name__)
_held: dict[str, IO[str]] = {}  # locked until Prefect has the run's end, or this process ends
_left_open: set[str] = set()


def begin(checkout: Path) -> None:
    """Register the current flow run for this process."""
    from prefect.runtime import flow_run

    folder = checkout / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{flow_run.id}.new"
    _held[flow_run.id] = file = path.open("w")
    wait_for_lock(file)
    begun = {"process": os.getpid(), "since": time.time(), "flow": flow_run.flow_name, "try": flow_run.run_count}
    _write(file, begun)
    path.rename(folder / f"{flow_run.id}.json")  # never visible without being locked


def note(checkout: Path, **facts: str) -> None:
    """Add facts to the current flow run's file: its `run` and `model`."""
    from prefect.runtime import flow_run

    _write(_held[flow_run.id], {**_read(checkout / FOLDER / f"{flow_run.id}.json"), **facts})


def leave_open() -> None:
    """Keep the current flow run's file after its end, so that `close_lost` reports the end to MLflow later."""
    from prefect.runtime import flow_run

    _left_open.add(flow_run.id)


def end(flow: Any, flow_run: Any, state: Any) -> None:
    """Unregister a flow run; a hook that Prefect calls after the end."""
    file = _held.pop(str(flow_run.id), None)
    if file is not None:
        if str(flow_run.id) not in _left_open:
            Path(file.name).with_name(f"{flow_run.id}.json").unlink(missing_ok=True)
        file.close()


def running(checkout: Path) -> list[dict[str, Any]]:
    """Return the facts of each flow run that a living process executes."""
    return [_read(path) for path in sorted((checkout / FOLDER).glob("*.json")) if not _is_free(path)]


def lost(checkout: Path) -> list[Path]:
    """Return the files of the flow runs whose process is gone."""
    return [path for path in sorted((checkout / FOLDER).glob("*.json")) if _is_free(path)]


def stop_running(checkout: Path) -> list[str]:
    """Stop all runs of this checkout, as Ctrl-C does, and wait until they have saved their state.

    Their workers are suspended first: an exiting worker kills its runs at once, and a live one restarts them.

    Returns:
        A line for each run.
    """
    stopped: dict[psutil.Process, tuple[str, str]] = {}
    for noted in running(checkout):
        with suppress(psutil.Error, KeyError):  # it has ended or has just started
            process = psutil.Process(noted["process"])
            if process.pid == os.getpid():
                continue
            workers = [parent for parent in process.parents() if {"worker", "start"} <= set(parent.cmdline())]
            for worker in workers:
                worker.suspend()
            process.terminate()
            resumption = "a worker resumes it" if workers else "run it again to resume it"
            stopped[process] = f"{noted['flow']} {noted.get('run', '')}".strip(), resumption
    until = time.monotonic() + STOP_SECONDS
    while not all(map(_has_ended, stopped)) and time.monotonic() < until:
        time.sleep(0.2)
    return [
        f"stopped {name}: what it finished is kept, {resumption}"
        if _has_ended(process)
        else f"{name} (process {process.pid}) still saves its state after {STOP_SECONDS:.0f} s"
        for process, (name, resumption) in stopped.items()
    ]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # its parent is suspended
    except psutil.NoSuchProcess:
        return True


def close_lost(checkout: Path) -> list[str]:
    """Mark flow runs whose process is gone as crashed in Prefect, and their runs as killed in MLflow and git.

    If a service does not answer, the run is left to the next call.

    Returns:
        A line for each closed run.
    """
    closed = []
    for path in lost(checkout):
        with path.open() as file:
            if not try_lock(file):  # another process closes it
                continue
            try:
                closed.append(_close(checkout, UUID(path.stem), _read(path)))
            except (OSError, PedigreeError) as error:
                logger.warning("flow run %s of a dead process is not closed yet: %s", path.stem, error)
                continue
            path.unlink(missing_ok=True)
    return closed


def _close(checkout: Path, flow_run: UUID, noted: dict[str, Any]) -> str:
    name = noted.get("run") or str(flow_run)
    if noted.get("run"):
        stage_runs.close_lost(noted["run"], noted["model"])
        root = Layout(checkout).runs / noted["run"]
        if root.exists():
            close_branch(root, f"Run interrupted: {LOST}")
    _crash(flow_run, noted)
    return f"{noted['flow']} {name}: {LOST}; closed"


def _crash(flow_run: UUID, noted: dict[str, Any]) -> None:
    """Set a run to crashed in Prefect, unless it has ended or was restarted; an automation restarts it."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(flow_run)
            state = run.state
            if state is None or not (state.is_running() or state.is_cancelling()) or run.run_count != noted["try"]:
                return
            message = f"{LOST} (process {noted['process']})"
            ended = Cancelled(message=message) if state.is_cancelling() else Crashed(message=message)
            client.set_flow_run_state(flow_run, ended, force=True)
    except ObjectNotFound:
        return
    except HTTPError as error:
        raise ServiceError(f"Prefect: {error}") from error


def _is_free(path: Path) -> bool:
    try:
        with path.open() as file:
            return try_lock(file)
    except FileNotFoundError:  # the run ended meanwhile
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # the run ended, or the file is being written
        return {}


def _write(file: IO[str], values: dict[str, Any]) -> None:
    """Write the file in place, because a replacement would not be locked."""
    file.seek(0)
    file.write(json.dumps(values))
    file.truncate()
    file.flush()


def main() -> None:
    """Close lost runs of the current folder, and print them."""
    for line in close_lost(Path.cwd()):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
