"""The processes of the local stack: started detached, found again by a mark in their environment, and ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from infra.local.services import Service
from infra.local.site import Site, StackError, without_proxy

MARK = "PEDIGREE_SERVICE"  # in the environment of every process of a stack, whoever its parent is by now
STOP_SECONDS = 10.0
PATIENCE_SECONDS = {"worker": 60.0}  # its flow runs save their state first
LOG_LIMIT_BYTES = 20_000_000
FOREIGN = ("AWS_", "MLFLOW_", "PREFECT_", "WEED_", "PEDIGREE_")


def spawn(site: Site, service: Service) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own and remember it before anything else happens."""
    log = site.log(service.name)
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.replace(log.with_suffix(".log.1"))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    inherited["TMPDIR"] = _temporary_folder()
    variables = {**inherited, **without_proxy(os.environ), **service.variables}
    variables |= {MARK: mark(site, service.name), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        offset = output.tell()
        process = subprocess.Popen(
            service.command,
            cwd=service.cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=service.umask,
        )
    created = psutil.Process(process.pid).create_time()
    record = {"pid": process.pid, "created": created, "fingerprint": service.fingerprint, "log_offset": offset}
    site.services[service.name] = record
    site.save()
    return process


def _temporary_folder() -> str:
    """A folder of this user: in a shared one Prefect's `runner_storage` belongs to the first user of the machine."""
    shared, own = Path(tempfile.gettempdir()), f"pedigree-{os.getuid()}"
    folder = shared if shared.name == own else shared / own  # the keeper has it already
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise StackError(f"{folder} is another user's: set TMPDIR to a folder of your own")
    return str(folder)


def mark(site: Site, name: str) -> str:
    """The value of `MARK` in the processes of a service."""
    return f"{site.folder}:{name}"


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def _is_ours(process: psutil.Process, mark: str) -> bool:
    """Whether a living process carries the mark."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def main_process(site: Site, name: str) -> psutil.Process | None:
    """The service's own process, unless it is gone or its pid belongs to another program by now."""
    record = site.services.get(name)
    if record is None:
        return None
    try:
        process = psutil.Process(record["pid"])
        # Two seconds: the time of boot, from which it is computed, moves when the clock is set.
        same = abs(process.create_time() - record["created"]) < 2.0
    except psutil.Error:
        return None
    return process if same and _is_ours(process, mark(site, name)) else None


def find(site: Site, names: tuple[str, ...]) -> list[psutil.Process]:
    """Every living process of the services: those that carry their mark, and all that descend from those.

    Services that the keeper started descend from it, and are not of it: they carry a mark of their own.
    """
    marks = {mark(site, name) for name in names}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if any(_is_ours(process, mark) for mark in marks):
            found[process.pid] = process
            try:
                children = process.children(recursive=True)
                found |= {child.pid: child for child in children if _mark_of(child) in (None, *marks)}
            except psutil.Error:
                continue
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in ourselves]


def stop(site: Site, *names: str) -> list[str]:
    """End the services' processes, politely first, and return the names of those that were running."""
    were = [name for name in names if main_process(site, name) is not None]
    with uninterrupted():
        patience = max((PATIENCE_SECONDS.get(name, STOP_SECONDS) for name in names), default=STOP_SECONDS)
        if left := end(lambda: find(site, names), patience):
            name = " or ".join(names)
            raise StackError(f"process {left[0].pid} of {name} does not end: stop it by hand with `kill -9`")
        if [name for name in names if site.services.pop(name, None)]:
            site.save()
    return were


def end(living: Callable[[], list[psutil.Process]], patience: float = STOP_SECONDS) -> list[psutil.Process]:
    """End processes, politely first, and return those that still live."""
    for method, seconds in (("terminate", patience), ("kill", STOP_SECONDS), ("kill", STOP_SECONDS)):
        left = living()
        for process in left:
            try:
                getattr(process, method)()
                process.resume()  # one that is frozen would not hear it
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=seconds)
    return living()


def blame(site: Site, name: str, what: str) -> str:
    """One line: the service, what happened, the gist of its latest log lines, and where the log is."""
    log = site.log(name)
    with log.open("rb") as file:
        size = log.stat().st_size
        file.seek(min(site.services.get(name, {}).get("log_offset", max(0, size - 4000)), size))
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))
    lines = [line.strip(" │╭╰─╮╯|") for line in text.splitlines()]
    lines = [line for line in lines if line]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    telling = [line for line in lines if re.search(r"error|fatal|in use|denied|invalid", line, re.IGNORECASE)]
    gist = (raised or telling or lines or ["nothing"])[-1]
    for secret in site.credentials.values():
        gist = gist.replace(secret, "***") if len(secret) > 8 else gist
    return f"{name} {what}; it said: {gist[:240]} (log: {log})"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait until the processes are gone."""
    with signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextmanager
def signals(handlers: dict[signal.Signals, Callable[..., object] | signal.Handlers]) -> Iterator[None]:
    """Set signal handlers for the block; only the main thread can, so elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = {which: handler for which, handler in handlers.items() if signal.getsignal(which) is not signal.SIG_IGN}
    before = {which: signal.signal(which, handler) for which, handler in wanted.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
