"""The history of champions from the audit log, and contradictions of the registry.

An alias records neither who set it nor when, and anyone with write access to the registry can move it. The log decides.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from components.core.references import ModelReference
from components.lineage.audit_chain import PROMOTE, ROLLBACK
from components.lineage.audit_log import Entry
from components.lineage.provenance import Tag

CHAMPION, PREVIOUS = "champion", "previous"
CHANGES = (PROMOTE, ROLLBACK)


@dataclass(frozen=True)
class Reign:
    """The period in which a version was the champion; `until` is None for the current one."""

    version: str  # NAME/3
    since: str
    until: str | None
    event: Entry

    def holds(self, time: datetime.datetime) -> bool:
        """Return whether the version was the champion at that time."""
        begin, end = (datetime.datetime.fromisoformat(t) if t else None for t in (self.since, self.until))
        assert begin is not None
        return begin <= time and (end is None or time < end)


def line_of_succession(entries: Iterable[Entry]) -> list[str]:
    """Return the champions to which a rollback can return, oldest first; the last is the champion, empty without one.

    A promotion puts a version on top, a rollback takes off those above the version that it returns to.
    """
    found: list[str] = []
    for entry in entries:
        if entry.action == PROMOTE and found[-1:] != [entry.subject]:
            found.append(entry.subject)
        elif entry.action == ROLLBACK and entry.subject in found:
            while found[-1] != entry.subject:
                found.pop()
    return found


def aliases_of(line: Sequence[str]) -> dict[str, str]:
    """Return the version that each alias belongs on, by a line of succession."""
    return dict(zip((CHAMPION, PREVIOUS), [*reversed(line[-2:])], strict=False))


def reigns(entries: Iterable[Entry]) -> list[Reign]:
    """Return the changes of the champion, oldest first."""
    changes = [entry for entry in entries if entry.action in CHANGES]
    pairs = zip_longest(changes, changes[1:])
    return [Reign(entry.subject, entry.time, later.time if later else None, entry) for entry, later in pairs if entry]


def unexplained(name: str, entries: Sequence[Entry], aliases: Mapping[str, Any], versions: Iterable[Any]) -> list[str]:
    """Describe each fact of a model in the registry that no audit event explains.

    Args:
        name: of the released model.
        entries: its audit log.
        aliases: its aliases in MLflow, to version numbers.
        versions: its versions in MLflow.
    """
    stated = aliases_of(line_of_succession(entries))
    found = []
    for alias in (CHAMPION, PREVIOUS):
        there = str(ModelReference(name, version=str(aliases[alias]))) if alias in aliases else None
        if there != stated.get(alias):
            found.append(f"the alias {alias} is on {there or 'no version'}, by the audit log it is on "
                         f"{stated.get(alias, 'no version')}")  # fmt: skip
    approved = {entry.subject: entry for entry in entries if entry.action in CHANGES}
    existing = {str(ModelReference(name, version=str(v.version))): v for v in versions}
    for address, version in existing.items():
        if address not in approved:
            found.append(f"{address}: no event lets it in")
            continue
        details = approved[address].details
        differing = [
            what
            for what, value in (("digest", version.tags.get(Tag.DIGEST)), ("source", str(version.source)))
            if details.get(what, value) != value
        ]
        if differing:
            found.append(f"{address}: its {' and '.join(differing)} is not what event "
                         f"{approved[address].sequence} approved")  # fmt: skip
    found += [f"{address}: deleted from MLflow since event {e.sequence}" for address, e in approved.items()
              if address not in existing]  # fmt: skip
    return found
