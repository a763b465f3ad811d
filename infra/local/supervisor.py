"""Starts, watches and stops the local stack as detached child processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from components.core.layout import Layout
from components.core.locks import exclusive
from components.core.user import ADMIN, REVIEWER, TRAINER
from infra.local.processes import MARK, blame, end, find, main_process, mark, signals, spawn, stop
from infra.local.services import KEEPER_STATE, Service, UnhealthyError, deployment, services
from infra.local.site import GRPC_OFFSET, QUIET, Site, StackError, settle, without_proxy

logger = logging.getLogger(__name__)

LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
STOP_ORDER = (("keeper",), ("deploy", "worker"), ("prefect", "mlflow"), ("s3",))
ADOPTED_GRACE_SECONDS = 15.0
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
    failing: bool = False  # it answers, and fails at what it does in the background

    def as_dict(self) -> dict[str, str | int | None]:
        """For JSON."""
        return asdict(self)


def environment(root: Path, role: str = ADMIN) -> dict[str, str]:
    """All variables that lead to the local stack of `root` in a role; it must have been started once."""
    site = Site.load(root)
    if "prefect" not in site.ports or not site.credentials:
        raise StackError(f"there is no local stack in {site.folder} yet: start it with `pedigree up`")
    if not site.has_roles:
        raise StackError(f"the local stack in {site.folder} was made without roles: `pedigree up` makes them")
    return {**site.variables(role), **without_proxy(os.environ)}


def connect(root: Path, start: bool = True, beside: bool = False, role: str = TRAINER) -> dict[str, str]:
    """The variables to apply: the team's services where the environment names them, else the local stack.

    Whoever has set a login to MLflow keeps it: a user of their own, or the admin, as `pedigree env` does.

    Args:
        root: the checkout.
        start: start the local stack where it is not running.
        beside: as of `up`.
        role: in which the local stack is used.

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
    inside = os.environ.get(MARK, "").startswith(mark(site, ""))  # a flow run must not restart its own worker
    if start and not inside:
        up(root, beside=beside)
    login = os.environ.get("MLFLOW_TRACKING_USERNAME")
    variables = environment(root, ADMIN if login == ADMIN else role)
    if login and login not in {ADMIN, TRAINER, REVIEWER}:
        variables = {key: value for key, value in variables.items() if key not in LOGIN}
    # A session token from elsewhere would be sent along with our keys, and refused.
    return {**variables, "AWS_SESSION_TOKEN": ""} if os.environ.get("AWS_SESSION_TOKEN") else variables


def up(root: Path, only: tuple[str, ...] = (), report: Report = logger.info, *, beside: bool = False) -> dict[str, str]:
    """Start what is not running and healthy, and return the variables that lead to it.

    Args:
        root: the checkout; the state lives in its `.pedigree` folder.
        only: names of services; all when empty.
        report: takes one line for each thing that happens.
        beside: return once S3, MLflow and Prefect are healthy, and let the worker start and the flows be deployed
            beside the caller, who needs neither; `unfinished` says what came of it.

    Raises:
        StackError: what could not start, and why; what this call had started is stopped again. A `prefect.yaml`
            that cannot be deployed is such an error too, but leaves the services running.
    """
    with _locked(root, report), _stoppable():
        site = Site.load(root)
        running = {name for name in site.services if main_process(site, name) is not None}
        for name in site.services.keys() - running:  # children of a dead service may still hold its port
            stop(site, name)
        for line in settle(site, running):
            report(line)
        wanted = [service for service in services(site) if not only or service.name in only]
        job = None if only else deployment(site)
        started: list[str] = []
        try:
            _start(site, [service for service in wanted if service.after is None], started, report)
            failure = _start_rest(site, wanted, job, started, report, beside)
        except BaseException:
            for group in STOP_ORDER:
                stop(site, *(name for name in group if name in started))
            raise
        if failure:
            raise StackError(failure)
    return {**(site.variables() if not only else site.storage_variables()), **without_proxy(os.environ)}


def unfinished(root: Path) -> str:
    """What `up` left to go on beside its caller and has not ended well, with what to do; empty if nothing."""
    site = Site.load(root)
    job = deployment(site) if "deploy" in site.services else None
    if job is None:
        return ""
    if main_process(site, job.name):
        return "the flows of prefect.yaml are still being deployed; `pedigree doctor` says when they are"
    return f"{blame(site, job.name, 'of prefect.yaml failed')}; `pedigree up` tries it again"


def revive(root: Path, names: tuple[str, ...], report: Report) -> tuple[str, ...]:
    """Start services again that are dead or do not answer; for the keeper.

    Returns:
        The names of those that were still down once no other command held the stack.

    Raises:
        StackError: one cannot start; the others run.
    """
    with _locked(root, report):
        site = Site.load(root)
        names = tuple(s.name for s in services(site) if s.name in names and _state(site, s).state != "healthy")
        wanted = [service for service in services(site) if service.name in names]
        for service in wanted:  # children of a dead service may still hold its port
            stop(site, service.name)
        for line in settle(site, {name for name in site.services if main_process(site, name) is not None}):
            report(line)
        _start(site, [service for service in services(site) if service.name in names], [], report)
        return names


def down(root: Path, report: Report = logger.info) -> list[str]:
    """Stop every process of the stack and return the names of the services that were running."""
    if not Layout(root).state.exists():
        return []
    end(lambda: find(Site.load(root), ("keeper",)))  # it may hold the lock, and would start all again
    with _locked(root, report):
        site = Site.load(root)
        stopped = [name for group in STOP_ORDER for name in stop(site, *group)]
        numbers = {number for port in site.ports.values() for number in (port, port + GRPC_OFFSET)}
        for socket in Path("/tmp").glob("seaweedfs-*.sock"):  # SeaweedFS leaves some of them behind
            if socket.stem.rpartition("-")[2] in map(str, numbers):
                socket.unlink(missing_ok=True)
    return stopped


def status(root: Path, ask: bool = True) -> list[Status]:
    """The state of every service; changes nothing and waits for no lock.

    Args:
        root: the checkout.
        ask: ask the services whether they work; else a service is taken as healthy where its process lives.
    """
    site = Site.load(root)
    if "prefect" not in site.ports or not site.credentials:
        names = ("s3", "mlflow", "prefect", "worker", "keeper")
        return [Status(name, "stopped", "", "", None, str(site.log(name))) for name in names]
    wanted = services(site)
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda service: _state(site, service, ask), wanted))


def _state(site: Site, service: Service, ask: bool = True) -> Status:
    """Look for the service's process and ask it whether it works."""
    process, state, details, failing = main_process(site, service.name), "healthy", _kept(site, service.name), False
    if process is None:
        state = "dead" if service.name in site.services else "stopped"
    elif ask:
        try:
            service.check()
            failing = True
            service.duties()
            failing = False
        except UnhealthyError as error:
            state, details = "unhealthy", [str(error), *details]
    log, pid = str(site.log(service.name)), process.pid if process else None
    return Status(service.name, state, "; ".join(details), service.url, pid, log, failing)


def _kept(site: Site, name: str) -> list[str]:
    """What the keeper did for a service, and what keeps it from doing more."""
    try:
        state = json.loads((site.folder / KEEPER_STATE).read_text())
    except (OSError, ValueError):
        return []
    done, lines = state["restarts"].get(name), []
    if done:
        times = "once" if done["times"] == 1 else f"{done['times']} times"
        lines.append(f"started again {times} by the keeper, last at {done['last']}: {done['why']}")
    if name == "keeper" and state["failure"]:
        lines.append(f"could not start a service, and tries again: {state['failure']}")
    return lines


def processes(root: Path) -> list[psutil.Process]:
    """Every living process that belongs to the stack of `root`."""
    return find(Site.load(root), tuple(name for group in STOP_ORDER for name in group))


def _start(site: Site, wanted: list[Service], started: list[str], report: Report) -> None:
    """Start the services side by side and wait until each is healthy; names go into `started` before their start."""
    waiting = {service.name: service for service in wanted}
    until: dict[str, float] = {}
    while waiting:
        for service in list(waiting.values()):
            name = service.name
            if name not in until:
                if _is_alive(site, service):
                    until[name] = time.monotonic() + ADOPTED_GRACE_SECONDS
                else:
                    until[name] = _restart(site, service, started, report)
            elif name not in started and (main_process(site, name) is None or time.monotonic() > until[name]):
                until[name] = _restart(site, service, started, report)
            if _is_healthy(site, service, until[name] if name in started else float("inf")):
                if name in started:
                    report(f"{name} is ready" + (f" at {service.url}" if service.url else ""))
                del waiting[name]
        if waiting:
            time.sleep(0.1)


def _is_alive(site: Site, service: Service) -> bool:
    """Whether the service's own process lives, and was started as it would be now."""
    alive = main_process(site, service.name) is not None
    return alive and site.services[service.name]["fingerprint"] == service.fingerprint


def _start_rest(
    site: Site, wanted: list[Service], job: Service | None, started: list[str], report: Report, beside: bool
) -> str:
    """Start what needs Prefect, and deploy beside it; returns why deploying failed, where that is waited for."""
    later = [service for service in wanted if service.after is not None]
    deploying = None
    if job and not (beside and main_process(site, job.name)):
        report("deploying the flows of prefect.yaml")
        stop(site, job.name)
        started.append(job.name)
        deploying = spawn(site, job)
    if not beside:
        _start(site, later, started, report)
        return _finish(site, job, deploying) if job and deploying else ""
    for service in later:
        if not _is_alive(site, service):
            _restart(site, service, started, report)
    return ""


def _restart(site: Site, service: Service, started: list[str], report: Report) -> float:
    """Clear what is left of the service, start it anew, and return the time until which it must be healthy."""
    if stop(site, service.name):
        report(f"{service.name} was not as it should be and starts again")
    started.append(service.name)
    spawn(site, service)
    return time.monotonic() + service.timeout_seconds


def _is_healthy(site: Site, service: Service, until: float) -> bool:
    """Whether the service holds and does what it should; a process that died or is late is a StackError."""
    try:
        service.prepare()
        service.check()
        return True
    except UnhealthyError as error:
        if main_process(site, service.name) is None and until < float("inf"):
            raise StackError(blame(site, service.name, "stopped while starting")) from error
        if time.monotonic() > until:
            late = f"is not healthy after {service.timeout_seconds:.0f} s: {error}"
            raise StackError(blame(site, service.name, late)) from error
        return False


def _finish(site: Site, job: Service, process: subprocess.Popen[bytes]) -> str:
    """Wait for a one-shot process and return what went wrong with it: nothing, if empty."""
    try:
        code = process.wait(timeout=job.timeout_seconds)
    except subprocess.TimeoutExpired:
        stop(site, job.name)
        return blame(site, job.name, f"took over {job.timeout_seconds:.0f} s")
    failure = blame(site, job.name, "of prefect.yaml failed, the services are up") if code != 0 else ""
    site.services.pop(job.name, None)
    site.save()
    if not failure:
        job.prepare()
    return failure


@contextmanager
def _locked(root: Path, report: Report) -> Iterator[None]:
    """Hold the stack's lock, so that two commands never start or stop the same stack at once."""
    folder = Layout(root).state
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "stack.lock").touch()
    except OSError as error:
        raise StackError(f"cannot write the state of the stack into {folder}: {error.strerror or error}") from error
    waits = "another command is starting or stopping the stack: waiting for it"
    with exclusive(folder / "stack.lock", lambda _: report(waits)):
        yield


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let `kill` and a closed terminal end a start as Ctrl-C does: with everything cleaned up."""
    with signals({signal.SIGTERM: signal.default_int_handler, signal.SIGHUP: signal.default_int_handler}):
        yield
