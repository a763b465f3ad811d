"""Prefect's automations of `prefect.yaml`: `python -m infra.automations` creates or updates them, by name.

`prefect deploy` takes a deployment's triggers from that file, and nothing that concerns all deployments.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def apply(file: Path) -> list[str]:
    """Make the server's automations what the file says.

    Args:
        file: `prefect.yaml`; its list `automations` is in the schema of `prefect automation create`.

    Returns:
        Their names. Automations that the file does not name stay as they are.
    """
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    wanted = [AutomationCore.model_validate(each) for each in yaml.safe_load(file.read_text()).get("automations", ())]
    with get_client(sync_client=True) as client:
        for automation in wanted:
            found = client.read_automations_by_name(automation.name)
            if found:
                client.update_automation(found[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted]


def main() -> None:
    """Apply `prefect.yaml` of the current folder."""
    for name in apply(Path("prefect.yaml")):
        sys.stdout.write(f"automation {name!r} is in place\n")


if __name__ == "__main__":
    main()
