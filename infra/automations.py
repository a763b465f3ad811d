"""What Prefect's server does by itself when something happens: `python -m infra.automations` makes it so.

`prefect deploy` takes the triggers of deployments from `prefect.yaml`; this takes its list `automations`, and the
failure notification. Applying twice changes nothing. One that is no longer wanted is deleted in Prefect's page.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from components.core.errors import PedigreeError
from infra.local.site import StackError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)

WEBHOOK_VARIABLE = "PEDIGREE_FAILURE_WEBHOOK"
WEBHOOK_BLOCK = "pedigree-failure"
FAILURE_NOTIFICATION = "pedigree: a run failed"
ENDED_BADLY = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
# `{"text": ...}` is what Slack, Mattermost and Teams take. `tojson` quotes what an error message may hold.
MESSAGE = (
    '{"text": {{ ("Pedigree: run " ~ flow_run.name ~ " of " ~ deployment.name ~ " " ~ flow_run.state.name ~ ": " ~ '
    '(flow_run.state.message or "no message") ~ " " ~ (flow_run | ui_url)) | tojson }}}'
)


def apply(file: Path) -> None:
    """Make or update the automations of a file, and those that the environment asks for.

    Args:
        file: `prefect.yaml`; its list `automations` is in the schema of `prefect automation create`.

    Raises:
        StackError: a setting is not allowed.
    """
    with get_client(sync_client=True) as client:
        for wanted in yaml.safe_load(file.read_text()).get("automations", ()):
            put(client, AutomationCore.model_validate(wanted))
        if url := os.environ.get(WEBHOOK_VARIABLE):
            failure_notification(client, url)


def failure_notification(client: SyncPrefectClient, url: str) -> None:
    """Call `url` when a run of a deployment with the tag `pedigree` fails, crashes or times out.

    The address is a secret (whoever has it can post): it is kept in a block, which Prefect encrypts in its database.
    Addresses of the own network are allowed; `allow_private_urls=False` of the block would refuse them.

    Raises:
        StackError: not an HTTP address.
    """
    if not url.startswith(("https://", "http://")):
        raise StackError(f"{WEBHOOK_VARIABLE}: not an address; allowed: https://HOST/PATH or http://HOST/PATH")
    block = Webhook.model_validate(
        {"url": url, "headers": {"Content-Type": "application/json"}, "allow_private_urls": True}
    )
    identity = cast("UUID", block.save(WEBHOOK_BLOCK, overwrite=True))  # a coroutine only where a loop runs
    trigger = EventTrigger(
        expect=ENDED_BADLY,
        match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
        match_related={"prefect.resource.id": "prefect.tag.pedigree"},  # type: ignore[arg-type]
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    automation = AutomationCore(
        name=FAILURE_NOTIFICATION,
        description=f"Calls the address of {WEBHOOK_VARIABLE}, block {WEBHOOK_BLOCK}.",
        trigger=trigger,
        actions=[CallWebhook(block_document_id=identity, payload=MESSAGE)],  # pyright: ignore[reportArgumentType]
    )
    put(client, automation)


def put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make the automation, or bring the one of its name to what is wanted.

    One that is so already is left alone: an update makes Prefect forget which runs it has seen.
    """
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
    elif _content(AutomationCore.model_validate(found[0].model_dump())) != _content(automation):
        client.update_automation(found[0].id, automation)
    logger.info("Prefect automation %r is on", automation.name)


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(mode="json", exclude={"trigger": {"id"}})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        apply(Path("prefect.yaml"))
    except PedigreeError as wrong:
        sys.exit(f"error: {wrong}")
