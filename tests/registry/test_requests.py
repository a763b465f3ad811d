"""A request for a decision, seen to happen: an event makes it, a worker suspends it, a person or a command ends it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from components.lineage.audit_log import PLATFORM, AuditLog
from components.registry.promote import reject
from flows.decisions import announce, announce_candidate, open_requests
from infra.local import supervisor
from tests.infra.test_duties import call, runs, wait_for

PROJECT = Path(__file__).parents[2]
ASK = """
from prefect import flow
from flows.promote import promote
from flows.verify import verify

@flow
def retrain(params=None, sources=None): ...
"""
SHORT = """
from flows import promote as asked
asked.DAYS = 2 / 86_400
promote = asked.promote
"""
pytestmark = pytest.mark.stack


@pytest.fixture
def deployed(stack):
    """Deployments as prefect.yaml has them, but for where their code lies; `short` waits two seconds, not 30 days."""
    project = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    review, promotion = (
        next(item for item in project["deployments"] if item["name"] == name) for name in ("review", "on-promotion")
    )
    (stack.root / "made").mkdir(exist_ok=True)
    (stack.root / "made" / "ask.py").write_text(ASK)
    (stack.root / "made" / "short.py").write_text(SHORT)
    weekly = next(item for item in project["deployments"] if item["entrypoint"] == "flows/verify.py:verify")
    short = {"name": "short", "entrypoint": "made/short.py:promote", "work_pool": review["work_pool"]}
    made = [{**review, "entrypoint": "made/ask.py:promote"}, {**promotion, "entrypoint": "made/ask.py:retrain"}, short]
    made.append({**weekly, "entrypoint": "made/ask.py:verify"})
    file = stack.root / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": made}))
    supervisor.up(stack.root)
    try:
        yield stack
    finally:
        file.unlink()
        for name in ("promote/review", "retrain/on-promotion", "promote/short", "verify/weekly"):
            found = call(stack, f"/deployments/name/{name}", None, "GET")
            call(stack, f"/deployments/{found['id']}", None, "DELETE")


def requests(stack: Any, candidate: str) -> list[dict[str, Any]]:
    found = call(stack, "/flow_runs/filter", {"deployments": {"name": {"any_": ["review", "short"]}}})
    return [run for run in found if run["parameters"]["reference"] == candidate]


def ended(stack: Any, candidate: str) -> dict[str, Any] | None:
    (run,) = requests(stack, candidate)
    return run["state"] if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED") else None


def start(stack: Any, deployment: str, parameters: dict[str, Any]) -> str:
    """Start a deployment's flow as its schedule does; return the id of the run."""
    found = call(stack, f"/deployments/name/{deployment}", None, "GET")
    asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return call(stack, f"/deployments/{found['id']}/create_flow_run", asked)["id"]


def verified(stack: Any, run: str) -> dict[str, Any] | None:
    state = call(stack, f"/flow_runs/{run}", None, "GET")["state"]
    return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else None


def switch_on(stack: Any, deployment: str) -> None:
    """As a person does in Prefect's page, where the trigger of a deployment is off."""
    found = call(stack, f"/deployments/name/{deployment}", None, "GET")
    (trigger,) = call(stack, f"/automations/related-to/prefect.deployment.{found['id']}", None, "GET")
    assert trigger["enabled"] is False
    call(stack, f"/automations/{trigger['id']}", {"enabled": True}, "PATCH")


def test_a_candidate_is_asked_for_once_and_decided_in_the_page_or_by_command(deployed, name: str, finished):
    """Or by nobody: a request that ends by itself leaves a candidate. A promotion starts what waits for one."""
    client = MlflowClient()
    client.create_registered_model(f"{name}-candidates")
    candidates = []
    for number in ("1", "2", "3"):
        version = client.get_model_version(f"{finished['name']}-candidates", number)
        model_id = version.source.removeprefix("models:/")
        made = client.create_model_version(
            f"{name}-candidates", version.source, version.run_id, tags=version.tags, model_id=model_id
        )
        candidates.append(f"{name}-candidates/{made.version}")
        for _ in range(2 if number != "3" else 0):
            announce_candidate(candidates[-1], version.tags["pedigree.digest"])
    forgotten = candidates.pop()
    start(deployed, "promote/short", {"reference": forgotten})
    switch_on(deployed, "retrain/on-promotion")
    wait_for("both requests", lambda: set(candidates) <= set(open_requests()), 240)
    assert [len(requests(deployed, candidate)) for candidate in candidates] == [1, 1]

    (asked,) = requests(deployed, candidates[0])
    answer = {"decision": "approve", "name": "Ann", "reason": "good", "waive": {"lineage": "no clone at the worker"}}
    call(deployed, f"/flow_runs/{asked['id']}/resume", {"run_input": answer})
    approved = wait_for("the end of the first", lambda: ended(deployed, candidates[0]), 240)
    assert (approved["type"], approved["message"]) == ("COMPLETED", f"promote: {name}/1, event 1")
    check = start(deployed, "verify/weekly", {"target": f"{name}@champion", "sample": None})
    wait_for(
        "the run of the promotion", lambda: [r["state_name"] for r in runs(deployed, "on-promotion")] == ["Completed"]
    )
    assert announce(reject(candidates[1], "fails at night", "Bob")) == []
    told = wait_for("the end of the second", lambda: ended(deployed, candidates[1]), 240)
    rejected = f"{candidates[1]}: rejected by Bob, event 2: fails at night"
    assert (told["type"], told["message"]) == ("COMPLETED", rejected)
    assert not set(candidates) & set(open_requests())
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"
    (event,) = (e for e in AuditLog.from_environment().read(name) if e.action == "promote")
    assert (event.actor, event.details["waived"]) == ("Ann", {"lineage": "no clone at the worker"})
    over = wait_for("the end of the request that nobody answers", lambda: ended(deployed, forgotten))
    assert (over["type"], over["message"]) == ("FAILED", "The flow was paused and never resumed.")
    assert forgotten not in open_requests()
    assert not [e for e in AuditLog.from_environment().read(name) if e.subject == forgotten]
    # The weekly check, of the new champion alone and in a folder without the run that registered it.
    state = wait_for("the end of the verification", lambda: verified(deployed, check), 240)
    assert state["type"] == "FAILED"
    assert re.match(rf"{name}@champion: \d+ faults, event \d+ of _platform: ", state["message"])
    log = AuditLog.from_environment().read(PLATFORM)
    (result,) = (entry for entry in log if (entry.action, entry.subject) == ("verify", f"{name}@champion"))
    assert not result.details["holds"]
    assert any("fetch the branch" in line for line in result.details["faults"])
    (page,) = call(deployed, "/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["verify"]}}})
    assert result.details["faults"][0] in page["data"]
    gates = f"gates-{candidates[0]}".replace("/", "-")
    (table,) = call(deployed, "/artifacts/latest/filter", {"artifacts": {"key": {"any_": [gates]}}})
    assert "| random | passed | knn_top1 minus that of random weights: +0.650" in table["data"]
