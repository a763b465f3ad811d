"""A request for a decision, seen to happen: an event makes it, a worker suspends it, a person or a command ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from components.lineage.audit_log import AuditLog
from components.registry.promote import reject
from flows.decisions import announce, announce_candidate, open_requests
from infra.local import supervisor
from tests.infra.test_duties import call, wait_for

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.stack


@pytest.fixture
def deployed(stack):
    """The deployment `review` as prefect.yaml has it, but for where its code lies."""
    project = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    review = next(item for item in project["deployments"] if item["name"] == "review")
    (stack.root / "made").mkdir(exist_ok=True)
    (stack.root / "made" / "ask.py").write_text("from flows.promote import promote\n")
    file = stack.root / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [{**review, "entrypoint": "made/ask.py:promote"}]}))
    supervisor.up(stack.root)
    try:
        yield stack
    finally:
        file.unlink()
        found = call(stack, "/deployments/name/promote/review", None, "GET")
        call(stack, f"/deployments/{found['id']}", None, "DELETE")


def requests(stack: Any, candidate: str) -> list[dict[str, Any]]:
    runs = call(stack, "/flow_runs/filter", {"deployments": {"name": {"any_": ["review"]}}})
    return [run for run in runs if run["parameters"]["reference"] == candidate]


def ended(stack: Any, candidate: str) -> dict[str, Any] | None:
    (run,) = requests(stack, candidate)
    return run["state"] if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED") else None


def test_a_candidate_is_asked_for_once_and_decided_in_the_page_or_by_command(deployed, name: str, finished):
    client = MlflowClient()
    client.create_registered_model(f"{name}-candidates")
    candidates = []
    for number in ("1", "2"):
        version = client.get_model_version(f"{finished['name']}-candidates", number)
        model_id = version.source.removeprefix("models:/")
        made = client.create_model_version(
            f"{name}-candidates", version.source, version.run_id, tags=version.tags, model_id=model_id
        )
        candidates.append(f"{name}-candidates/{made.version}")
        for _ in range(2):
            announce_candidate(candidates[-1], version.tags["pedigree.digest"])
    wait_for("both requests", lambda: set(candidates) <= set(open_requests()), 240)
    assert [len(requests(deployed, candidate)) for candidate in candidates] == [1, 1]

    (asked,) = requests(deployed, candidates[0])
    answer = {"decision": "approve", "name": "Ann", "reason": "good", "waive": {"lineage": "no clone at the worker"}}
    call(deployed, f"/flow_runs/{asked['id']}/resume", {"run_input": answer})
    approved = wait_for("the end of the first", lambda: ended(deployed, candidates[0]), 240)
    assert (approved["type"], approved["message"]) == ("COMPLETED", f"promote: {name}/1, event 1")
    assert announce(reject(candidates[1], "fails at night", "Bob")) == []
    told = wait_for("the end of the second", lambda: ended(deployed, candidates[1]), 240)
    rejected = f"{candidates[1]}: rejected by Bob, event 2: fails at night"
    assert (told["type"], told["message"]) == ("COMPLETED", rejected)
    assert not set(candidates) & set(open_requests())
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"
    (event,) = (e for e in AuditLog.from_environment().read(name) if e.action == "promote")
    assert (event.actor, event.details["waived"]) == ("Ann", {"lineage": "no clone at the worker"})
    gates = f"gates-{candidates[0]}".replace("/", "-")
    (table,) = call(deployed, "/artifacts/latest/filter", {"artifacts": {"key": {"any_": [gates]}}})
    assert "| random | passed | knn_top1 minus that of random weights: +0.650" in table["data"]
