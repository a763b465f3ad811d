"""What the locked versions do together in the background: schedules, events, late runs, crashed runs started again.

Each is seen to happen, with real flows that the stack's worker runs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows import keeper, live
from infra.local import supervisor
from infra.local.services import UnhealthyError, program, request
from infra.local.site import Site

PROJECT = Path(__file__).parents[2]
FLOWS = """
import os, signal, time
from pathlib import Path
from prefect import flow
from prefect.runtime import flow_run
from flows import interrupt, live

@flow
def tick(): ...

@flow
def killed_once():
    if flow_run.run_count == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@flow(on_completion=[live.end])
def stopped_once():
    with interrupt.handled() as interrupted:
        try:
            live.begin(Path.cwd())
            if flow_run.run_count == 1:
                time.sleep(300)
        except KeyboardInterrupt:
            return interrupt.end(interrupted)
"""
pytestmark = pytest.mark.stack


def call(stack, path: str, body: Any = None, method: str = "POST") -> Any:
    url = stack.env["PREFECT_API_URL"].removesuffix("/api")
    for _ in range(20):
        try:
            return request(url, f"/api{path}", stack.env["PREFECT_API_AUTH_STRING"], method, body)
        except UnhealthyError as error:  # a busy machine: SQLite is locked, or the answer is late
            if "503" not in str(error) and "timed out" not in str(error):
                raise
            time.sleep(1)
    raise AssertionError(f"{path}: the server does not answer")


def runs(stack, deployment: str) -> list[dict[str, Any]]:
    wanted = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return call(stack, "/flow_runs/filter", wanted)


def wait_for(what: str, seen: Callable[[], Any], seconds: float = 120) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := seen():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} was not seen in {seconds:.0f} s")


def started(stack, name: str, flow: str) -> dict[str, Any]:
    deployment = call(stack, f"/deployments/name/{flow}/{name}", None, "GET")
    return call(stack, f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})


@pytest.fixture(scope="module")
def deployed(stack) -> Iterator[Any]:
    """Deployments of small flows, with the automations of the project's own prefect.yaml."""
    pool = [program("prefect"), "--no-prompt", "work-pool", "create", "unserved", "--type", "process"]
    subprocess.run(pool, check=True, capture_output=True)
    (stack.root / "made").mkdir(exist_ok=True)
    (stack.root / "made" / "duties.py").write_text(FLOWS)
    project = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    here = {"work_pool": project[".pool"], "tags": ["pedigree"]}
    tick, killed, stopped = (f"made/duties.py:{flow}" for flow in ("tick", "killed_once", "stopped_once"))
    grown = {"type": "event", "expect": ["duties.grown"], "enabled": True, "name": "duties grown"}
    file = stack.root / "prefect.yaml"
    text = {
        "deployments": [
            {"name": "clock", "entrypoint": tick, "schedules": [{"interval": 20}], **here},
            {"name": "listener", "entrypoint": tick, "triggers": [grown], **here},
            {"name": "nobody", "entrypoint": tick, "work_pool": {"name": "unserved"}, "tags": ["unwatched"]},
            {"name": "again", "entrypoint": killed, "concurrency_limit": 1, **here},
            {"name": "later", "entrypoint": stopped, "concurrency_limit": 1, **here},
        ],
        "automations": project["automations"],
    }
    file.write_text(yaml.safe_dump(text))
    supervisor.up(stack.root)
    started(stack, "nobody", "tick")
    for _ in range(2):
        started(stack, "again", "killed-once")
    started(stack, "later", "stopped-once")
    try:
        yield stack
    finally:
        file.unlink()
        for deployment in call(stack, "/deployments/filter", {}):
            if deployment["name"] in ("clock", "listener", "nobody", "again", "later"):
                call(stack, f"/deployments/{deployment['id']}", None, "DELETE")


def test_a_schedule_fires_again_and_again(deployed):
    def completed() -> list[str]:
        return [run["id"] for run in runs(deployed, "clock") if run["state_name"] == "Completed"]

    wait_for("two scheduled runs", lambda: len(completed()) >= 2)
    assert all(run["auto_scheduled"] for run in runs(deployed, "clock"))
    clock = call(deployed, "/deployments/name/tick/clock", None, "GET")
    call(deployed, f"/deployments/{clock['id']}/pause_deployment")  # each run costs seconds, which the others need


def test_an_event_starts_a_run(deployed):
    assert os.environ["PREFECT_API_URL"] == deployed.env["PREFECT_API_URL"]
    from prefect.events import Event
    from prefect.events.clients import get_events_client
    from prefect.utilities.asyncutils import run_coro_as_sync

    async def send() -> None:
        async with get_events_client() as client:
            await client.emit(Event(event="duties.grown", resource={"prefect.resource.id": "duties.x"}))

    run_coro_as_sync(send())
    wait_for("the run of the event", lambda: [r for r in runs(deployed, "listener") if r["state_name"] == "Completed"])


def test_a_crashed_run_is_started_again_and_frees_its_slot(deployed):
    """Two runs of a deployment that takes one at a time: the first is killed, and neither blocks the other."""

    def ended() -> list[dict[str, Any]]:
        return [run for run in runs(deployed, "again") if run["state_name"] == "Completed"]

    wait_for("the end of both runs", lambda: len(ended()) == 2, seconds=480)
    # Not exactly: on a busy machine Prefect's worker reports the first try's crash once more, in the second one.
    assert all(run["run_count"] >= 2 for run in ended())


def test_a_run_that_down_stops_goes_on_in_a_second_try(deployed):
    """The worker is frozen, so that it neither kills the run nor takes it up again; here it is woken, not ended."""
    wait_for("the run's process", lambda: live.running(deployed.root))
    assert live.stop_running(deployed.root) == ["stopped stopped-once: what it finished is kept, a worker resumes it"]
    for process in supervisor.processes(deployed.root):
        with suppress(psutil.NoSuchProcess):
            process.resume()

    def ended() -> list[dict[str, Any]]:
        return [run for run in runs(deployed, "later") if run["state_name"] == "Completed"]

    (run,) = wait_for("the end of the run", ended)
    states = [state["name"] for state in call(deployed, f"/flow_run_states/?flow_run_id={run['id']}", None, "GET")]
    assert [states.count(name) for name in ("Running", "AwaitingRetry", "Crashed")] == [2, 1, 0]


def test_the_keeper_starts_a_crashed_run_whose_event_was_lost(deployed, monkeypatch, caplog):
    """On a busy SQLite Prefect loses events; no automation looks at runs of this tag at all."""
    monkeypatch.setattr(keeper, "TAG", "unwatched")
    monkeypatch.setattr(keeper, "CRASHED_SECONDS", (0.0, 3600.0))
    begun, never = (started(deployed, "nobody", "tick")["id"] for _ in range(2))
    for run, state in ((begun, "RUNNING"), (begun, "CRASHED"), (never, "CRASHED")):
        call(deployed, f"/flow_runs/{run}/set_state", {"state": {"type": state}, "force": True})
    with caplog.at_level(logging.WARNING):
        keeper.start_crashed_again(Site.load(deployed.root), tries := {})
        assert tries == {begun: 1}
        call(deployed, f"/flow_runs/{begun}/set_state", {"state": {"type": "CRASHED"}, "force": True})
        keeper.start_crashed_again(Site.load(deployed.root), tries)  # it has not begun again: it would crash for ever
        call(deployed, f"/flow_runs/{begun}/set_state", {"state": {"type": "RUNNING"}, "force": True})
        call(deployed, f"/flow_runs/{begun}/set_state", {"state": {"type": "CRASHED"}, "force": True})
        keeper.start_crashed_again(Site.load(deployed.root), tries)
    assert tries == {begun: 2}
    states = [call(deployed, f"/flow_runs/{run}", None, "GET")["state_name"] for run in (begun, never)]
    assert states == ["AwaitingRetry", "Crashed"]
    assert [message.partition(" ")[2] for message in caplog.messages] == [
        "had crashed, and Prefect's automation did not come; started again"
    ] * 2


def test_a_run_that_nobody_takes_is_late(deployed):
    wait_for("a late run", lambda: [run for run in runs(deployed, "nobody") if run["state_name"] == "Late"])
