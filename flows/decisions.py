"""Send events on candidates and decisions to Prefect, and read its requests for decisions.

A request is a suspended run of `promote/review`. The audit log is the record: a decision is valid even if Prefect does
not answer, and a request for a candidate that was decided on elsewhere ends when it is resumed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from components.core.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from components.registry.promote import Decision

REGISTERED, PROMOTED, REJECTED = (
    "pedigree.candidate.registered",
    "pedigree.model.promoted",
    "pedigree.candidate.rejected",
)
REVIEW = "promote/review"  # the deployment that asks for a decision
MAX_RUNS = 200


def announce(done: Decision) -> list[str]:
    """Send the event of a decision, and end the request for it; return lines on what failed.

    What Prefect has already is not sent again, so a decision that is run again tells a Prefect that was away.
    The event of a promotion or a rollback is `pedigree.model.promoted`, on which `prefect.yaml` can start a run.
    """
    if not os.environ.get("PREFECT_API_URL"):
        return []
    from httpx import HTTPError

    name = REJECTED if done.action == "reject" else PROMOTED
    payload = {"model": done.name, "version": done.version, "action": done.action, "event": done.event.sequence}
    try:
        _send(name, f"pedigree.model.{done.name}", done.event.hash, payload)
        for version in {done.version, done.candidate}:
            _resume(version, done)
    except HTTPError as error:
        return [
            f"Prefect was not told ({_reason(error)}): no run that waits for {name} starts, and its request stays open"
        ]
    return []


def announce_candidate(version: str, digest: str) -> None:
    """Send the event of a new candidate, once, however often it is asked for; `prefect.yaml` makes it a request."""
    _send(REGISTERED, f"pedigree.candidate.{version}", f"{version} {digest}", {"version": version})


def open_requests() -> dict[str, str]:
    """Return the candidates that wait for a decision in Prefect's page, with the address of the request.

    Raises:
        ServiceError: Prefect does not answer, so that the requests are not known.
    """
    if not os.environ.get("PREFECT_API_URL"):
        return {}
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.utilities.urls import url_for

    try:
        with get_client(sync_client=True) as client:
            found = _suspended(client)
    except HTTPError as error:
        url = os.environ["PREFECT_API_URL"]
        raise ServiceError(f"Prefect at {url} does not answer ({_reason(error)}), so requests are not shown") from error
    return {run.parameters["reference"]: url_for("flow-run", obj_id=run.id) or "" for run in found}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _send(event: str, resource: str, what: str, payload: Mapping[str, Any]) -> None:
    """Send an event whose id is derived from its content, unless Prefect has it."""
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.events.filters import EventFilter, EventIDFilter

    message = Event(
        id=uuid5(NAMESPACE_URL, f"{event} {what}"),
        event=event,
        resource=Resource({"prefect.resource.id": resource}),
        payload=dict(payload),
    )
    with get_client(sync_client=True) as client:
        if not client.read_events(EventFilter(id=EventIDFilter(id=[message.id])), limit=1).events:
            client.request("POST", "/events", json=[message.model_dump(mode="json")])


def _resume(version: str, done: Decision) -> None:
    """Let the requests for a decision on this version see that it has been made."""
    from prefect.client.orchestration import get_client

    answer = {
        "decision": "reject" if done.action == "reject" else "approve",
        "name": done.event.actor,
        "reason": done.event.details["reason"],
    }
    with get_client(sync_client=True) as client:
        for run in _suspended(client):
            if run.parameters.get("reference") == version:
                client.resume_flow_run(UUID(str(run.id)), run_input=answer)


def _suspended(client: SyncPrefectClient) -> list[FlowRun]:
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )

    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[REVIEW.partition("/")[0]])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended"]))),
        limit=MAX_RUNS,
    )
