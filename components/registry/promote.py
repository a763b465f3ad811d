"""Promotion: a candidate becomes the champion, with its bytes copied out of training's reach and a written reason.

Every step can be repeated: the copy is addressed by its digest, the version is found by its digest, the event by the
version it names. A promotion that died anywhere is finished by the same command, and ends in the same state.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.core.config import ConfigError
from components.core.git import person
from components.core.mlflow_client import authenticated_user
from components.core.references import CANDIDATES, ModelReference
from components.core.user import ADMIN, REVIEWER, TRAINER, user_name
from components.lineage.audit_log import AuditLog, Entry, Event
from components.lineage.provenance import WEIGHTS_FILE, Tag
from components.registry.publish import (
    RegistryError,
    digest_of,
    ensure_registered_model,
    file_digests,
    one_line_errors,
    registry_client,
    versions,
)
from components.registry.release import Released

CHAMPION = "champion"
PREVIOUS = "previous"
ACTION = "promote"


@dataclass(frozen=True)
class Promotion:
    """What a promotion did.

    Attributes:
        name: registered model.
        version: its version that is the champion now.
        candidate: the candidate version it was made from, `NAME-candidates/3`.
        digest: SHA-256 of the model's files.
        source: where the released bytes are.
        previous: version that was the champion before; None at first.
        event: the audit entry; None when nothing had to be done.
        changed: False when the candidate was the champion already.
    """

    name: str
    version: str
    candidate: str
    digest: str
    source: str
    previous: str | None
    event: Entry | None
    changed: bool


def promote(reference: str, reason: str, actor: str | None = None) -> Promotion:
    """Make a candidate the champion of its model.

    Args:
        reference: `NAME@latest` or `NAME/3`, a version of `NAME-candidates`.
        reason: why; it goes into the audit log.
        actor: who decides; None finds it out, see `who`.

    Raises:
        ConfigError: no reason, or what is no reference.
        RegistryError: no such candidate, bytes that are not those that were registered, or a service that refuses.
        RecordError: the audit log is broken or does not take the event; the alias has not moved then.
    """
    if not reason.strip():
        raise ConfigError("a promotion needs a reason, which goes into the audit log: --reason TEXT")
    client, audit, released = registry_client(), AuditLog.from_environment(), Released()
    with one_line_errors():
        name, candidate = resolve_candidate(client, reference)
        digest = candidate.tags.get(Tag.DIGEST)
        if not digest:
            raise RegistryError(f"{_address(candidate)}: has no tag {Tag.DIGEST}, so its bytes cannot be checked")
        champion = with_alias(client, name, CHAMPION)
        entries = audit.read(name)
        done = champion and _same(champion, candidate) and released.is_signed(name, digest)
        if champion and done and _last_promoted(entries) == _address(champion):
            before = with_alias(client, name, PREVIOUS)
            return _promotion(champion, before.version if before else None, None)
        source = _copy_bytes(released, candidate, name, digest)
        version = _released_version(client, name, candidate, source)
        previous = champion if champion and champion.version != version.version else with_alias(client, name, PREVIOUS)
        event = _record(audit, entries, version, previous, who(actor) | {"reason": reason.strip()})
        client.set_model_version_tag(name, version.version, Tag.AUDIT, f"{event.sequence}:{event.hash}")
        if _last_promoted(audit.read(name)) != _address(version):
            raise RegistryError(
                f"{_address(version)}: another promotion of {name} followed at once; look at the audit log"
            )
        _move_aliases(client, name, version, previous)
    return _promotion(version, previous.version if previous else None, event)


def resolve_candidate(client: MlflowClient, reference: str) -> tuple[str, ModelVersion]:
    """(NAME, version of NAME-candidates) that `NAME@alias` or `NAME/number` means."""
    asked = ModelReference.parse(reference)
    if asked is None:
        raise ConfigError(f"{reference!r}: not a candidate; write NAME@latest or NAME/NUMBER")
    name = asked.name.removesuffix(CANDIDATES)
    registered = name + CANDIDATES
    try:
        return name, replace(asked, name=registered).find(client)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        known = sorted((v.version for v in versions(client, registered)), key=int)
        have = f"has versions {', '.join(map(str, known))}" if known else "has no versions"
        raise RegistryError(f"{reference}: no such candidate; {registered} {have}") from None


def with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with this alias; None when there is none."""
    try:
        return ModelReference(name, alias=alias).find(client)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None


def who(actor: str | None) -> dict[str, str]:
    """The person who acts, and how that is known: MLflow's user, unless many share it, then whom git knows."""
    if actor:
        return {"actor": actor, "actor_from": "given by the caller"}
    login = authenticated_user()
    if login and login not in {ADMIN, TRAINER, REVIEWER}:
        return {"actor": login, "actor_from": "MLflow user, authenticated by the server"}
    shared = f"; MLflow's login {login} is shared" if login else "; MLflow knows no users"
    if found := person(Path.cwd()):
        return {"actor": found, "actor_from": f"git's user.name and user.email{shared}"}
    return {"actor": user_name(), "actor_from": f"operating system user{shared}"}


def verify_files(folder: Path, version: ModelVersion) -> dict[str, str]:
    """Compare a downloaded model with what its version was registered with; return its files with their SHA-256.

    Raises:
        RegistryError: a file was changed, added or removed since; the message names the files.
    """
    stated, found = json.loads(version.tags.get(Tag.FILES, "{}")), file_digests(folder)
    differing = sorted(path for path in stated.keys() | found.keys() if stated.get(path) != found.get(path))
    if differing:
        raise RegistryError(
            f"{_address(version)}: not the bytes that were registered: {', '.join(differing[:5])} "
            f"({len(differing)} of {len(stated)} files); nothing was promoted"
        )
    weights = {sha256 for path, sha256 in found.items() if path.endswith(f"/{WEIGHTS_FILE}")}
    if digest_of(found) != version.tags.get(Tag.DIGEST) or weights != {version.tags.get(Tag.WEIGHTS_SHA256)}:
        raise RegistryError(
            f"{_address(version)}: its tags contradict each other ({Tag.FILES}, {Tag.DIGEST}); register it again"
        )
    return found


def _copy_bytes(released: Released, candidate: ModelVersion, name: str, digest: str) -> str:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(download_artifacts(artifact_uri=str(candidate.source), dst_path=temporary))
        files = verify_files(folder, candidate)
        return released.copy_in(folder, files, name, digest)


def _released_version(client: MlflowClient, name: str, candidate: ModelVersion, source: str) -> ModelVersion:
    described = f"Released by a person each. `pedigree trace {name}@champion` says what the one in use was made from."
    ensure_registered_model(client, name, described)
    made = versions(client, name, DIGEST=candidate.tags[Tag.DIGEST], CANDIDATE=_address(candidate))
    if made:
        return min(made, key=lambda v: int(v.version))
    tags = {**candidate.tags, Tag.CANDIDATE: _address(candidate)}
    return client.create_model_version(
        name, source=source, run_id=candidate.run_id, tags=tags, description=candidate.description
    )


def _record(
    audit: AuditLog, entries: list[Entry], version: ModelVersion, previous: ModelVersion | None, by: dict[str, str]
) -> Entry:
    """Write the event, unless the last promotion in the log is this one (its process died before the alias moved)."""
    if _last_promoted(entries) == _address(version):
        return next(e for e in reversed(entries) if e.action == ACTION)
    details = {
        "reason": by["reason"],
        "actor_from": by["actor_from"],
        "candidate": version.tags[Tag.CANDIDATE],
        "digest": version.tags[Tag.DIGEST],
        "source": version.source,
        "run": version.run_id,
        "previous": _address(previous) if previous else None,
    }
    return audit.append(Event(str(version.name), ACTION, _address(version), by["actor"], details))


def _move_aliases(client: MlflowClient, name: str, version: ModelVersion, previous: ModelVersion | None) -> None:
    # `previous` first: a process that dies between the two leaves a champion, and the next one sets both again.
    if previous:
        client.set_registered_model_alias(name, PREVIOUS, previous.version)
    client.set_registered_model_alias(name, CHAMPION, version.version)


def _promotion(version: ModelVersion, previous: str | None, event: Entry | None) -> Promotion:
    return Promotion(
        name=str(version.name),
        version=str(version.version),
        candidate=version.tags[Tag.CANDIDATE],
        digest=version.tags[Tag.DIGEST],
        source=str(version.source),
        previous=str(previous) if previous else None,
        event=event,
        changed=event is not None,
    )


def _same(champion: ModelVersion, candidate: ModelVersion) -> bool:
    stated = (champion.tags.get(Tag.DIGEST), champion.tags.get(Tag.CANDIDATE))
    return stated == (candidate.tags[Tag.DIGEST], _address(candidate))


def _last_promoted(entries: list[Entry]) -> str | None:
    return next((e.subject for e in reversed(entries) if e.action == ACTION), None)


def _address(version: ModelVersion) -> str:
    return f"{version.name}/{version.version}"
