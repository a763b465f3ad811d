"""Find the runs, commits and DVC objects to which the registry and the audit log refer, and which `gc` must keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from components.core.mlflow_client import reported
from components.core.references import COMMIT, DATA_ID, RUN_ID, ModelReference
from components.lineage.audit_chain import REGISTER
from components.lineage.audit_log import PLATFORM, AuditLog, Entry
from components.lineage.lock_file import RecordError
from components.lineage.provenance import Tag, data_versions

REMOVED_TAG = "pedigree.removed"  # time of removal, on the MLflow runs of a run that `pedigree gc` removed
DATA_TAGS = (Tag.CURATED, Tag.POOL, Tag.EVALUATION)
PAGE = 200


@dataclass(frozen=True)
class Claim:
    """References of one version or audit event.

    Attributes:
        because: `registered` or `audited`.
        by: the referrer, such as `version pedigree-candidates/3`.
        runs: run ids.
        ids: DVC ids.
        lock_sha256: of the `dvc.lock` that it was registered with.
    """

    because: str
    by: str
    runs: frozenset[str]
    commits: frozenset[str]
    ids: frozenset[str] = frozenset()
    lock_sha256: str | None = None


def versions(client: Any) -> list[Any]:
    """Return all versions of all registered models.

    Raises:
        TrackingError: MLflow does not answer, as in all functions that take its client.
    """
    with reported():
        return list(_pages(lambda token: client.search_model_versions(max_results=PAGE, page_token=token)))


def champions(client: Any) -> dict[str, str]:
    """Return `NAME-candidates 3` -> `champion as NAME 1` for each candidate that is a current champion."""
    found = {}
    for version in versions(client):
        with reported():
            aliases = client.get_registered_model(version.name).aliases if Tag.CANDIDATE in version.tags else {}
        if str(aliases.get("champion")) == str(version.version):
            found[version.tags[Tag.CANDIDATE].replace("/", " ")] = f"champion as {version.name} {version.version}"
    return found


def version_claims(found: Iterable[Any]) -> list[Claim]:
    """Return the claim of each version with a commit tag."""
    return [_claim(version) for version in found if version.tags.get(Tag.COMMIT)]


def audit_claims(log: AuditLog, client: Any) -> tuple[list[Claim], list[str]]:
    """Return the claims of audit events and of their MLflow runs, and a note for each missing run.

    Events of runs and ingests claim nothing, or no run could ever be removed. A registration claims its run as long as
    MLflow has the version.

    Raises:
        RecordError: a chain is broken, so nothing may be removed.
        StorageError: S3 does not answer.
    """
    claims, notes = [], []
    for entry in (entry for name in log.names() if name != PLATFORM for entry in log.read(name)):
        if entry.action == REGISTER:
            continue
        by, text = f"audit event {entry.name}/{entry.sequence}", json.dumps(asdict(entry))
        tags = _run_tags(client, entry)
        if tags is None:
            notes.append(f"{by} names the MLflow run {entry.details['run']}, which MLflow does not have any more")
        text += json.dumps(tags or {})
        ids = frozenset(id_ for id_ in DATA_ID.findall(text) if id_.endswith(".dir"))
        claims.append(Claim("audited", by, frozenset(RUN_ID.findall(text)), frozenset(COMMIT.findall(text)), ids))
    return claims, notes


def mlflow_runs(client: Any, model_names: Iterable[str], query: str) -> list[Any]:
    """Return MLflow's runs of these models (each is an experiment) that match a query."""
    with reported():
        experiments = [client.get_experiment_by_name(name) for name in sorted(set(model_names))]
        ids = [experiment.experiment_id for experiment in experiments if experiment is not None]
        if not ids:
            return []
        return list(_pages(lambda token: client.search_runs(ids, query, max_results=PAGE, page_token=token)))


def _claim(version: Any) -> Claim:
    by, tags = f"version {ModelReference.of_version(version)}", version.tags
    try:
        ids = {data.dvc for tag in DATA_TAGS for data in data_versions(tags, tag)}
    except (ValueError, TypeError):
        raise RecordError(f"{by}: its tags do not say which data it was made from ({', '.join(DATA_TAGS)})") from None
    branch = tags.get(Tag.BRANCH, "")
    runs = frozenset([branch.removeprefix("runs/")] if branch.startswith("runs/") else [])
    ids |= {tags[Tag.WEIGHTS_DVC]} if tags.get(Tag.WEIGHTS_DVC) else set()
    return Claim("registered", by, runs, frozenset([tags[Tag.COMMIT]]), frozenset(ids), tags.get(Tag.LOCK_SHA256))


def _run_tags(client: Any, entry: Entry) -> Mapping[str, str] | None:
    """Return the tags of an event's MLflow run; empty without a run; None if MLflow does not have it."""
    from mlflow.exceptions import MlflowException

    if not isinstance(entry.details.get("run"), str):
        return {}
    with reported():
        try:
            return client.get_run(entry.details["run"]).data.tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def _pages(ask: Any) -> Iterator[Any]:
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return
