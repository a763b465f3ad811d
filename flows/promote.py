"""Ask a person for a decision on a candidate in Prefect's page, and carry it out."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from prefect import State, flow, get_run_logger, suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from components.core.user import REVIEWER
from flows.decisions import announce
from flows.failure import failed
from infra.local import supervisor

DAYS = 30  # to decide; after them the candidate stays a candidate
FORM = "**{verdict}**\n\n{gates}\n\nApprove, reject, or approve and waive each gate that fails, with the reason why."


class Answer(RunInput):
    """What a reviewer fills in."""

    decision: Literal["approve", "reject"]
    name: str = Field(description="Who decides; it goes into the audit log.")
    reason: str = Field(description="Why; it goes into the audit log.")
    waive: dict[str, str] = Field(default_factory=dict, description='Failed gates, such as {"champion": "is noise"}.')


@flow(name="promote", flow_run_name="{reference}", persist_result=False)
def promote(reference: str) -> State[Any]:
    """Show a candidate's gates, wait for a decision, and carry it out.

    Prefect runs this from the top again once the decision is there, so the gates are judged anew at that moment.

    Args:
        reference: NAME@latest or NAME-candidates/NUMBER.
    """
    try:
        os.environ.update(supervisor.connect(Path.cwd(), start=False, role=REVIEWER))
        return _promote(reference)
    except Exception as error:
        return failed(error)


def _promote(reference: str) -> State[Any]:
    from components.registry import promote as decisions
    from components.registry import review as reviews
    from components.registry.publish import one_line_errors, registry_client

    with one_line_errors():
        client = registry_client()
        found = reviews.review_reference(client, reference, Path.cwd())
        if decided := reviews.decided(found.version):
            get_run_logger().info("%s: %s; nothing is asked", found.version, decided)
            return Completed(message=f"{found.version}: {decided}")
    table = gates_table(found)
    key = re.sub(r"[^a-z0-9]+", "-", f"gates-{found.version}".lower())
    create_markdown_artifact(f"**{found.verdict}**\n\n{table}", key=key, description=f"Gates of {found.version}")
    lines = "\n".join(f"- **{gate.name}** {gate.state}: {gate.text}" for gate in found.gates)  # a table is cut there
    form = Answer.with_initial_data(description=FORM.format(verdict=found.verdict, gates=lines))
    answer = suspend_flow_run(form, timeout=int(timedelta(days=DAYS).total_seconds()), key="decision")
    if answer.decision == "reject":
        done = decisions.reject(found.version, answer.reason, answer.name)
    else:
        done = decisions.promote(found.version, answer.reason, Path.cwd(), answer.waive, answer.name)
    for note in announce(done):
        get_run_logger().warning(note)
    return Completed(message=f"{done.action}: {done.version}, event {done.event.sequence}")


def gates_table(found: Any) -> str:
    """Return the gates of a review as a markdown table."""
    rows = [f"| {gate.name} | {gate.state} | {gate.text.replace('|', '/')} |" for gate in found.gates]
    return "\n".join(["| gate | | found |", "|---|---|---|", *rows])
