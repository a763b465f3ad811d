"""Starts, watches and stops the local stack as detached child processes."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from infra.local.services import Service, UnhealthyError, deployment, services
from infra.local.site import GRPC_OFFSET, QUIET, Site, StackError, settle, without_proxy

logger = logging.getLogger(__name__)

MARK = "PEDIGREE_SERVICE"  # in the environment of every process of a stack, whoever its parent is by now
STOP_ORDER = (("deploy", "worker"), ("prefect", "mlflow"), ("s3",))
ADOPTED_GRACE_SECONDS = 15.0
STOP_SECONDS = 10.0
LOG_LIMIT_BYTES = 20_000_000
FOREIGN = ("AWS_", "MLFLOW_", "PREFECT_", "WEED_", "PEDIGREE_")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Status:
    """State of one service: `healthy`, `unhealthy`, `dead` or `stopped`."""

    service: str
    state: str
    detail: str
    url: str
    pid: int | None
    log: str

    def as_dict(self) -> dict[str, str | int | None]:
        """For JSON."""
        return asdict(self)


def environment(root: Path) -> dict[str, str]:
    """All variables that lead to the local stack of `root`, which must have been started once."""
    site = Site.load(root)
    if "prefect" not in site.ports or not site.credentials:
        raise StackError(f"there is no local stack in {site.folder} yet: start it with `pedigree up`")
    return {**site.variables(), **without_proxy(os.environ)}


def connect(root: Path, start: bool = True) -> dict[str, str]:
    """The variables to apply: the team's services where the environment names them, else the local stack.

    Args:
        root: the checkout.
        start: start the local stack where it is not running.

    Raises:
        StackError: the environment names only a part of a team's services, or the local stack cannot start.
    """
    names = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    site = Site.load(root)
    if given and ("prefect" not in site.ports or any(site.variables().get(k) != v for k, v in given.items())):
        buckets = ("PEDIGREE_DATA_BUCKET", "PEDIGREE_MODELS_BUCKET", "PEDIGREE_AUDIT_BUCKET")
        missing = [name for name in (*names, *buckets) if not os.environ.get(name)]
        if missing:
            named = f"{' and '.join(given)} set, but not {', '.join(missing)}"
            raise StackError(f"{named}: set all of them, or none of them for the local stack")
        return dict(QUIET)
    inside = os.environ.get(MARK, "").startswith(_mark(site, ""))  # a flow run must not restart its own worker
    variables = up(root) if start and not inside else environment(root)
    # A session token from elsewhere would be sent along with our keys, and refused.
    return {**variables, "AWS_SESSION_TOKEN": ""} if os.environ.get("AWS_SESSION_TOKEN") else variables


def up(root: Path, only: tuple[str, ...] = (), report: Report = logger.info) -> dict[str, str]:
    """Start what is not running and healthy, and return the variables that lead to it.

    Args:
        root: the checkout; the state lives in its `.pedigree` folder.
        only: names of services; all when empty.
        report: takes one line for each thing that happens.

    Raises:
        StackError: what could not start, and why; what this call had started is stopped again. A `prefect.yaml`
            that cannot be deployed is such an error too, but leaves the services running.
    """
    with _locked(root, report), _stoppable():
        site = Site.load(root)
        running = {name for name in site.services if _main(site, name) is not None}
        for name in site.services.keys() - running:  # children of a dead service may still hold its port
            _stop(site, name)
        for line in settle(site, running):
            report(line)
        wanted = [service for service in services(site) if not only or service.name in only]
        job = None if only else deployment(site)
        started: list[str] = []
        try:
            _start(site, [service for service in wanted if service.after is None], started, report)
            if job:  # beside the worker's start
                report("deploying the flows of prefect.yaml")
                started.append(job.name)
                deploying = _spawn(site, job)
            _start(site, [service for service in wanted if service.after is not None], started, report)
            if job:
                failure = _finish(site, job, deploying)
        except BaseException:
            for group in STOP_ORDER:
                _stop(site, *(name for name in group if name in started))
            raise
        if job and failure:
            raise StackError(failure)
    return {**(site.variables() if not only else site.storage_variables()), **without_proxy(os.environ)}


def down(root: Path, report: Report = logger.info) -> list[str]:
    """Stop every process of the stack and return the names of the services that were running."""
    if not (root / ".pedigree").exists():
        return []
    with _locked(root, report):
        site = Site.load(root)
        stopped = [name for group in STOP_ORDER for name in _stop(site, *group)]
        numbers = {number for port in site.ports.values() for number in (port, port + GRPC_OFFSET)}
        for socket in Path("/tmp").glob("seaweedfs-*.sock"):  # SeaweedFS leaves some of them behind
            if socket.stem.rpartition("-")[2] in map(str, numbers):
                socket.unlink(missing_ok=True)
    return stopped


def status(root: Path) -> list[Status]:
    """The state of every service; changes nothing and waits for no lock."""
    site = Site.load(root)
    if "prefect" not in site.ports or not site.credentials:
        names = ("s3", "mlflow", "prefect", "worker")
        return [Status(name, "stopped", "", "", None, str(site.log(name))) for name in names]
    wanted = services(site)
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda service: _state(site, service), wanted))


def _state(site: Site, service: Service) -> Status:
    """Look for the service's process and ask it whether it works."""
    process, state, detail = _main(site, service.name), "healthy", ""
    if process is None:
        state = "dead" if service.name in site.services else "stopped"
    else:
        try:
            service.check()
        except UnhealthyError as error:
            state, detail = "unhealthy", str(error)
    log = str(site.log(service.name))
    return Status(service.name, state, detail, service.url, process.pid if process else None, log)


def processes(root: Path) -> list[psutil.Process]:
    """Every living process that belongs to the stack of `root`."""
    return _processes(Site.load(root), tuple(name for group in STOP_ORDER for name in group))


def _start(site: Site, wanted: list[Service], started: list[str], report: Report) -> None:
    """Start the services side by side and wait until each is healthy; names go into `started` before their start."""
    waiting = {service.name: service for service in wanted}
    until: dict[str, float] = {}
    while waiting:
        for service in list(waiting.values()):
            name = service.name
            if name not in until:
                alive = _main(site, name) is not None
                if alive and site.services[name]["fingerprint"] == service.fingerprint:
                    until[name] = time.monotonic() + ADOPTED_GRACE_SECONDS
                else:
                    until[name] = _restart(site, service, started, report)
            elif name not in started and (_main(site, name) is None or time.monotonic() > until[name]):
                until[name] = _restart(site, service, started, report)
            if _is_healthy(site, service, until[name] if name in started else float("inf")):
                if name in started:
                    report(f"{name} is ready at {service.url}")
                del waiting[name]
        if waiting:
            time.sleep(0.1)


def _restart(site: Site, service: Service, started: list[str], report: Report) -> float:
    """Clear what is left of the service, start it anew, and return the time until which it must be healthy."""
    if _stop(site, service.name):
        report(f"{service.name} was not as it should be and starts again")
    started.append(service.name)
    _spawn(site, service)
    return time.monotonic() + service.timeout_seconds


def _is_healthy(site: Site, service: Service, until: float) -> bool:
    """Whether the service holds and does what it should; a process that died or is late is a StackError."""
    try:
        service.prepare()
        service.check()
        return True
    except UnhealthyError as error:
        if _main(site, service.name) is None and until < float("inf"):
            raise StackError(_blame(site, service.name, "stopped while starting")) from error
        if time.monotonic() > until:
            late = f"is not healthy after {service.timeout_seconds:.0f} s: {error}"
            raise StackError(_blame(site, service.name, late)) from error
        return False


def _finish(site: Site, job: Service, process: subprocess.Popen[bytes]) -> str:
    """Wait for a one-shot process and return what went wrong with it: nothing, if empty."""
    try:
        code = process.wait(timeout=job.timeout_seconds)
    except subprocess.TimeoutExpired:
        _stop(site, job.name)
        return _blame(site, job.name, f"took over {job.timeout_seconds:.0f} s")
    failure = _blame(site, job.name, "of prefect.yaml failed, the services are up") if code != 0 else ""
    site.services.pop(job.name, None)
    site.save()
    if not failure:
        job.prepare()
    return failure


def _spawn(site: Site, service: Service) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own and remember it before anything else happens."""
    log = site.log(service.name)
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.replace(log.with_suffix(".log.1"))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    variables = {**inherited, **without_proxy(os.environ), **service.variables}
    variables |= {MARK: _mark(site, service.name), "PYTHONUNBUFFERED": "1"}
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


def _mark(site: Site, name: str) -> str:
    return f"{site.folder}:{name}"


def _is_ours(process: psutil.Process, mark: str) -> bool:
    """Whether a living process carries the mark."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def _main(site: Site, name: str) -> psutil.Process | None:
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
    return process if same and _is_ours(process, _mark(site, name)) else None


def _processes(site: Site, names: tuple[str, ...]) -> list[psutil.Process]:
    """Every living process of the services: those that carry their mark, and all that descend from those."""
    marks = {_mark(site, name) for name in names}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if any(_is_ours(process, mark) for mark in marks):
            found[process.pid] = process
            try:
                found |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.Error:
                continue
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in ourselves]


def _stop(site: Site, *names: str) -> list[str]:
    """End the services' processes, politely first, and return the names of those that were running."""
    were = [name for name in names if _main(site, name) is not None]
    with _uninterrupted():
        for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
            left = _processes(site, names)
            for process in left:
                try:
                    end(process)
                except psutil.Error:
                    continue
            psutil.wait_procs(left, timeout=STOP_SECONDS)
        if left := _processes(site, names):
            raise StackError(f"process {left[0].pid} of {names[0]} does not end: stop it by hand with `kill -9`")
        if [name for name in names if site.services.pop(name, None)]:
            site.save()
    return were


def _blame(site: Site, name: str, what: str) -> str:
    """One line: the service, what happened, the gist of its latest log lines, and where the log is."""
    log = site.log(name)
    with log.open("rb") as file:
        file.seek(site.services.get(name, {}).get("log_offset", max(0, log.stat().st_size - 4000)))
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
def _locked(root: Path, report: Report) -> Iterator[None]:
    """Hold the stack's lock, so that two commands never start or stop the same stack at once."""
    folder = root / ".pedigree"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / "stack.lock").open("w")
    except OSError as error:
        raise StackError(f"cannot write the state of the stack into {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another command is starting or stopping the stack: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let `kill` and a closed terminal end a start as Ctrl-C does: with everything cleaned up."""
    with _signals({signal.SIGTERM: signal.default_int_handler, signal.SIGHUP: signal.default_int_handler}):
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait until the processes are gone."""
    with _signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextmanager
def _signals(handlers: dict[signal.Signals, Callable[..., object] | signal.Handlers]) -> Iterator[None]:
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
