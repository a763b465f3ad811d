"""What a reviewer decides on: a version beside the champion of today, and its gates."""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.core.metrics import Interval
from components.core.mlflow_client import server_uri, without_login
from components.core.model_files import ModelFilesError
from components.core.references import CANDIDATES, LATEST, ModelReference
from components.core.registered_weights import download_model, download_weights
from components.core.signing import SignatureError
from components.lineage.audit_chain import DECISIONS, PROMOTE, REJECT
from components.lineage.audit_log import AuditLog, Entry
from components.lineage.champions import CHAMPION
from components.lineage.provenance import Tag
from components.lineage.trace import trace
from components.registry.facts import (
    BY_IMAGE,
    FACTS,
    FOLDER,
    Facts,
    metrics_in,
    own_intervals,
    paired_differences,
    read_by_image,
    read_facts,
)
from components.registry.gates import Evidence, Gate, failed, judge, verdict
from components.registry.making import Making, read_making
from components.registry.publish import RegistryError, versions
from components.registry.standing import Standing, address, resolve, with_alias
from components.registry.withdrawals import open_takedown

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class Beside:
    """What a version is compared with: the champion, or where there is none the newest earlier candidate.

    Attributes:
        version: its address.
        scores: its metrics; empty where they are not known.
        differences: the version minus it on the same test images, by metric; None: they cannot be compared.
        incomparable: why not.
        unmatched: metrics that were measured of the version and not of it.
        otherwise: how its features differ, such as `pooling cls, not cls_texture`; empty where they do not.
    """

    version: str
    scores: Mapping[str, float]
    differences: Mapping[str, Interval] | None
    incomparable: str = ""
    unmatched: Sequence[str] = ()
    otherwise: str = ""


@dataclass(frozen=True)
class Review:
    """A version beside the champion.

    Attributes:
        version: its address; of one that is about to be registered, the model's name.
        reigns: it is the champion itself.
        champion: address of the champion, of the one before where it reigns itself; None: there is none.
        beside: what it is compared with; None: there is nothing.
        facts: what was recorded of it.
        making: how it was made; None: it was registered before that was recorded.
        intervals: what it scored, with 95 % intervals, by metric.
        gates: their outcomes now.
        decisions: events on it, and on the candidate that it was or what that was released as, oldest first.
        unexplained: what the registry says and no audit event explains.
    """

    version: str
    reigns: bool
    champion: str | None
    beside: Beside | None
    facts: Facts
    making: Making | None
    intervals: Mapping[str, Interval]
    gates: list[Gate]
    decisions: list[Entry]
    unexplained: list[str]

    @property
    def verdict(self) -> str:
        """One line."""
        return verdict(self.gates)

    @property
    def failed(self) -> list[Gate]:
        """The gates that do not let it pass."""
        return failed(self.gates)


@dataclass(frozen=True)
class Undecided:
    """The newest candidate of a model, on which nobody has decided; `score` and `verdict` are of its registration."""

    version: str
    made: str
    score: str
    verdict: str


@dataclass(frozen=True)
class _Record:
    """What a version's folder says of it; `by_image` has columns image_id, model, metric, value."""

    facts: Facts
    by_image: pa.Table
    making: Making | None

    def of(self, model: str) -> pa.Table:
        """The rows of one model."""
        return self.by_image.filter(pc.equal(self.by_image["model"], model))

    def own(self) -> pa.Table:
        """The rows of the version itself."""
        return self.of(self.facts.model)


def review(
    standing: Standing, version: ModelVersion, root: Path, actor: str | None = None, authenticated: bool = False
) -> Review:
    """Judge a version beside the champion of today.

    Args:
        standing: of its model.
        version: a candidate, or a released version.
        root: a clone of the repository whose commits made it.
        actor: who would promote it; None: not known yet.
        authenticated: MLflow has authenticated the actor.

    Raises:
        RegistryError: the version was registered without the facts that gates need.
        TrackingError: MLflow does not answer, or its bytes are not those that were registered.
    """
    mine = address(version)
    record = _read(mine)
    if record is None:
        raise RegistryError(
            f"{mine}: has no {FOLDER}/{FACTS}, which the gates need; it was registered by an older Pedigree: run again"
        )
    champion = standing.champion if standing.champion != mine else standing.previous
    candidate = version.tags.get(Tag.CANDIDATE, mine)
    beside = _beside(record, champion or _earlier(standing.client, candidate))
    evidence = dataclasses.replace(
        _evidence(record, champion, beside),
        missing=trace(mine, root).missing,
        weights=_fault(mine, root),
        rejected=_rejected(standing.entries, mine),
        takedown=open_takedown(version, standing.entries, {mine, candidate}, root),
        actor=actor,
        authenticated=authenticated,
    )
    return Review(
        version=mine,
        reigns=standing.champion == mine,
        champion=champion,
        beside=beside,
        facts=record.facts,
        making=record.making,
        intervals=own_intervals(record.own()),
        gates=judge(evidence),
        decisions=[e for e in standing.entries if {e.subject, e.details.get("candidate")} & {mine, candidate}],
        unexplained=standing.unexplained(),
    )


def review_reference(client: MlflowClient, reference: str, root: Path) -> Review:
    """Judge the version that a person names; as `review`, and an earlier change that was cut short is finished first.

    Raises:
        ConfigError: what is no reference.
        RegistryError: there is no such version; or as for `review`.
    """
    version = resolve(client, reference)
    standing = Standing.read(ModelReference(str(version.name)).model)
    standing.settle()
    return review(standing, version, root)


def undecided(client: MlflowClient) -> list[Undecided]:
    """The newest candidate of each model, where it was neither released nor rejected, by the audit log."""
    found, log = [], AuditLog.from_environment()
    for model in client.search_registered_models(filter_string=f"name LIKE '%{CANDIDATES}'"):
        version = with_alias(client, str(model.name), LATEST)
        if version is None or decided(address(version), log):
            continue
        made = datetime.datetime.fromtimestamp(version.creation_timestamp / 1000, datetime.UTC)
        tags = version.tags
        score, told = tags.get(Tag.SCORE, ""), tags.get(Tag.VERDICT, "registered without gates")
        found.append(Undecided(address(version), f"{made:%Y-%m-%d %H:%M}", score, told))
    return sorted(found, key=lambda candidate: candidate.made, reverse=True)


def decided(candidate: str, log: AuditLog | None = None) -> str | None:
    """What was last decided on a candidate, `NAME-candidates/3`, by the audit log; None: nothing yet."""
    asked = ModelReference.parse(candidate)
    assert asked is not None
    for entry in reversed((log or AuditLog.from_environment()).read(asked.model)):
        if entry.action == PROMOTE and entry.details.get("candidate") == candidate:
            return f"released as {entry.subject}"
        if entry.action == REJECT and entry.subject == candidate:
            return f"rejected by {entry.actor}, event {entry.sequence}: {entry.details.get('reason', '')}"
    return None


def page_url(version: str) -> str:
    """Address of a version's page in MLflow."""
    return f"{without_login(server_uri() or '')}/#/models/{version.replace('/', '/versions/')}"


def review_at_registration(facts: Facts, making: Making, by_image: Path, client: MlflowClient, name: str) -> Review:
    """What can be said of a version when it is registered: without its trace, beside the alias's champion."""
    record = _Record(facts, read_by_image(by_image), making)
    found = with_alias(client, name.removesuffix(CANDIDATES), CHAMPION)
    champion = address(found) if found else None
    beside = _beside(record, champion or _earlier(client, name))
    gates = judge(_evidence(record, champion, beside))
    return Review(
        version=name,
        reigns=False,
        champion=champion,
        beside=beside,
        facts=facts,
        making=making,
        intervals=own_intervals(record.own()),
        gates=gates,
        decisions=[],
        unexplained=[],
    )


def _evidence(record: _Record, champion: str | None, beside: Beside | None) -> Evidence:
    return Evidence(
        facts=record.facts,
        champion=champion,
        earlier=beside.version if beside and champion is None else None,
        differences=beside.differences if beside else None,
        incomparable=beside.incomparable if beside else "",
        unmatched=beside.unmatched if beside else (),
    )


def _earlier(client: MlflowClient, candidate: str) -> str | None:
    """The newest candidate before this one, `NAME-candidates/3`; without a number, the newest of all."""
    name, _, before = candidate.partition("/")
    numbers = [int(v.version) for v in versions(client, name) if v.status == "READY"]
    earlier = [number for number in numbers if not before or number < int(before)]
    return str(ModelReference(name, version=str(max(earlier)))) if earlier else None


def _beside(record: _Record, other: str | None) -> Beside | None:
    """The model minus another version; else why they cannot be compared.

    The run has evaluated the champion of its time on the same images. If another version is asked for, that one's own
    values count, if they are of the same images.
    """
    if other is None:
        return None
    if record.facts.champion == f"models:/{other}":
        theirs, scores = record.of(CHAMPION), record.facts.metrics(CHAMPION)  # as an evaluation calls it
        otherwise = ""
    else:
        found = _read(other)
        if found is None:
            return Beside(other, {}, None, f"{other} was registered without its results by image; run again")
        theirs, scores = found.own(), found.facts.metrics()
        otherwise = _otherwise(record.making, found.making)
    mine, others = metrics_in(record.own()), metrics_in(theirs)
    if missing := [metric for metric in others if metric not in mine]:
        return Beside(other, scores, None, f"{', '.join(missing)} was measured of {other} only; run again")
    differences = paired_differences(record.own(), theirs)
    why = "" if differences else "the two were scored on different images; run again"
    unmatched = [metric for metric in mine if metric not in others]
    return Beside(other, scores, differences, why, unmatched, otherwise)


def _otherwise(mine: Making | None, theirs: Making | None) -> str:
    if mine is None or theirs is None:
        return ""
    ours, others = mine.preprocessing.model_dump(), theirs.preprocessing.model_dump()
    return ", ".join(f"{key} {value}, not {ours[key]}" for key, value in others.items() if value != ours[key])


def _read(version: str) -> _Record | None:
    """What a version's folder in MLflow or in the released prefix says of it."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = download_model(f"models:/{version}", Path(temporary), f"artifacts/{FOLDER}")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        try:
            facts = read_facts(folder)
            return _Record(facts, read_by_image(folder / BY_IMAGE), read_making(folder)) if facts else None
        except (ValueError, OSError, RecursionError) as error:  # of JSON and Parquet
            said = str(error).splitlines()[0]
            raise RegistryError(f"{version}: {FOLDER} is not what a run registers, do not use it: {said}") from error


def _fault(version: str, root: Path) -> str | None:
    """What is wrong with a version's weights; None: they load, and are finite."""
    from components.model.export import WeightsError, load_backbone  # torch: seconds

    try:
        load_backbone(download_weights(f"models:/{version}", root))
    except (WeightsError, ModelFilesError, SignatureError) as error:
        return str(error)
    return None


def _rejected(entries: list[Entry], version: str) -> str | None:
    entry = next((e for e in reversed(entries) if e.subject == version and e.action in DECISIONS), None)
    if entry is None or entry.action != REJECT:
        return None
    return f"{entry.actor} rejected it on {entry.time[:10]} (event {entry.sequence}): {entry.details['reason']}"
