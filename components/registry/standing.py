"""How a released model stands: its audit log beside its aliases and versions in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.core.config import ConfigError
from components.core.references import CANDIDATES, ModelReference
from components.lineage.audit_anchors import anchor_model
from components.lineage.audit_chain import Head
from components.lineage.audit_log import AuditLog, Entry, Event, OvertakenError
from components.lineage.champions import CHAMPION, CHANGES, PREVIOUS, aliases_of, line_of_succession, unexplained
from components.registry.publish import RegistryError, registry_client, versions

NOT_THERE = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


@dataclass(frozen=True)
class Standing:
    """One model's log and registry, as they were when they were read.

    Attributes:
        name: of the released model.
        entries: its audit log, verified.
    """

    client: MlflowClient
    audit: AuditLog
    name: str
    entries: list[Entry]

    @classmethod
    def read(cls, name: str) -> Standing:
        """Read a model's log.

        Raises:
            RegistryError: MLFLOW_TRACKING_URI is not set.
            RecordError: the log is broken, or no bucket is named.
        """
        client, audit = registry_client(), AuditLog.from_environment()
        return cls(client, audit, name, audit.read(name))

    @cached_property
    def line(self) -> list[str]:
        """The champions that can be returned to, oldest first; the last one is the champion."""
        return line_of_succession(self.entries)

    @property
    def champion(self) -> str | None:
        """Address of the champion, as the log says."""
        return self.line[-1] if self.line else None

    @property
    def previous(self) -> str | None:
        """Address of the version that a rollback returns to."""
        return self.line[-2] if len(self.line) > 1 else None

    def record(self, event: Event) -> Standing:
        """Append an event that was decided on what this standing says, and return the new standing.

        Raises:
            OvertakenError: an event on the same version came first, or one that changed the champion.
        """
        try:
            entry = self.audit.append(event, after=len(self.entries))
        except OvertakenError as error:
            about = {event.subject, event.details.get("candidate")}
            if error.entry.action in CHANGES or error.entry.subject in about:
                raise
            return self._with(error.entry).record(event)
        return self._with(entry)

    def _with(self, entry: Entry) -> Standing:
        return Standing(self.client, self.audit, self.name, [*self.entries, entry])

    def settle(self) -> bool:
        """Move the aliases to where the log has them, if a change that was cut short left them; says whether it did."""
        aliases, stated = self._aliases(), _stated(self.line)
        last = max((i for i, entry in enumerate(self.entries) if entry.action in CHANGES), default=None)
        if last is None or aliases == stated:
            return False
        before = _stated(line_of_succession(self.entries[:last]))
        if aliases not in (before, {**before, **{k: v for k, v in stated.items() if k == PREVIOUS}}):
            return False
        self.move_aliases()
        return True

    def move_aliases(self) -> None:
        """Put the aliases where the log has them.

        `previous` first: a process that dies between the two leaves a champion, and the next one sets both again.
        """
        for alias, number in sorted(_stated(self.line).items(), reverse=True):
            self.client.set_registered_model_alias(self.name, alias, number)
        if self.previous is None and PREVIOUS in self._aliases():
            self.client.delete_registered_model_alias(self.name, PREVIOUS)

    def anchor(self) -> None:
        """Tag the released model, if there is one, with its last event, so that one that was cut off is seen."""
        last = self.entries[-1]
        anchor_model(self.client, self.name, self.name, Head(last.sequence, last.hash))

    def unexplained(self) -> list[str]:
        """What the registry says and no event explains."""
        return unexplained(self.name, self.entries, self._aliases(), versions(self.client, self.name))

    def _aliases(self) -> dict[str, str]:
        try:
            found = self.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code not in NOT_THERE:
                raise
            return {}
        return {alias: str(number) for alias, number in found.items() if alias in (CHAMPION, PREVIOUS)}


def resolve(client: MlflowClient, reference: str) -> ModelVersion:
    """The version that a person means by `NAME@champion`, `NAME@latest` (the newest candidate) or `NAME/NUMBER`.

    Raises:
        ConfigError: what is no reference.
        RegistryError: there is no such version; the message says which there are.
    """
    asked = ModelReference.parse(reference)
    if asked is None:
        raise ConfigError(
            f"{reference!r}: not a version; write NAME@latest for the newest candidate, NAME@champion, "
            f"NAME/NUMBER or NAME{CANDIDATES}/NUMBER"
        )
    try:
        return asked.find(client)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
    names = (asked.model, asked.model + CANDIDATES)
    have = [f"{name} has {_listed(client, name)}" for name in names]
    raise RegistryError(f"{reference}: no such version; {', '.join(have)}")


def with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with this alias; None when there is none."""
    try:
        return ModelReference(name, alias=alias).find(client)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None


def address(version: ModelVersion) -> str:
    """`NAME/3`."""
    return str(ModelReference.of_version(version))


def _listed(client: MlflowClient, name: str) -> str:
    numbers = sorted((str(v.version) for v in versions(client, name)), key=int)
    return f"versions {', '.join(numbers)}" if numbers else "no versions"


def _stated(line: Sequence[str]) -> dict[str, Any]:
    """Aliases with their numbers, by a line of succession."""
    return {alias: version.rpartition("/")[2] for alias, version in aliases_of(line).items()}
