"""Who was champion when, from logs that are written by hand."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from components.lineage.audit_log import Entry
from components.lineage.champions import line_of_succession, reigns, unexplained


def log(*events: tuple[str, int]) -> list[Entry]:
    entries = []
    for number, (action, version) in enumerate(events, start=1):
        details = {"reason": "r", "digest": f"d{version}", "source": f"s3://b/{version}"}
        time = f"2026-11-{number:02}T12:00:00.000+00:00"
        entries.append(Entry("m", number, "", time, "ann", action, f"m/{version}", details, ""))
    return entries


def version(number: int, digest: str | None = None) -> Any:
    tags = {"pedigree.digest": digest or f"d{number}"}
    return SimpleNamespace(version=str(number), tags=tags, source=f"s3://b/{number}")


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ((), []),
        ([("promote", 1), ("accept-code", 9), ("promote", 2)], ["m/1", "m/2"]),
        ([("promote", 1), ("promote", 2), ("rollback", 1)], ["m/1"]),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2), ("rollback", 1)], ["m/1"]),
        ([("promote", 1), ("promote", 2), ("rollback", 1), ("promote", 3)], ["m/1", "m/3"]),
        ([("promote", 1), ("promote", 1), ("promote", 2), ("reject", 4)], ["m/1", "m/2"]),
    ],
)
def test_a_rollback_goes_back_one_more_each_time(events, line):
    assert line_of_succession(log(*events)) == line


def test_who_was_champion_at_a_time():
    found = reigns(log(("promote", 1), ("reject", 7), ("promote", 2), ("rollback", 1)))
    noon = [datetime.datetime(2026, 11, day, 12, 30, tzinfo=datetime.UTC) for day in (1, 2, 3, 4)]
    at = [[reign.version for reign in found if reign.holds(time)] for time in noon]
    assert at == [["m/1"], ["m/1"], ["m/2"], ["m/1"]]
    assert reigns([]) == []
    assert not any(reign.holds(noon[0] - datetime.timedelta(hours=1)) for reign in found)


def test_what_the_registry_says_alone_is_unexplained():
    entries = log(("promote", 1), ("promote", 2))
    versions = [version(1), version(2)]
    fine = {"champion": "2", "previous": "1"}
    assert unexplained("m", entries, fine, versions) == []
    assert unexplained("m", entries, {**fine, "champion": "3"}, [*versions, version(3)]) == [
        "the alias champion is on m/3, by the audit log it is on m/2",
        "m/3: no event lets it in",
    ]
    assert unexplained("m", entries, {"champion": "2"}, versions) == [
        "the alias previous is on no version, by the audit log it is on m/1"
    ]
    assert unexplained("m", entries, fine, [version(1, "other"), version(2)]) == [
        "m/1: its digest is not what event 1 approved"
    ]
    assert unexplained("m", entries, fine, [version(2)]) == ["m/1: deleted from MLflow since event 1"]
    assert unexplained("m", [], {}, []) == []
