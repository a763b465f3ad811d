"""Decisions on versions: promote, reject, roll back. Each is an event in the audit log before it can be seen.

Every step can be repeated: the copy is addressed by its digest, the version is found by its digest, aliases follow the
log. A decision that died anywhere is finished by the next command on that model, and ends in the same state.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.core.config import ConfigError
from components.core.git import person
from components.core.mlflow_client import authenticated_user
from components.core.model_files import differing
from components.core.references import ModelReference
from components.core.registered_weights import download_model
from components.core.signing import verify_folder
from components.core.user import SHARED_LOGINS, user_name
from components.lineage.audit_chain import DECISIONS, PROMOTE, REJECT, ROLLBACK
from components.lineage.audit_log import Entry, Event
from components.lineage.champions import CHANGES
from components.lineage.provenance import WEIGHTS_FILE, Tag
from components.registry.gates import AS_A_USER, GATES, SECOND_PERSON, failed
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
from components.registry.review import Review, review
from components.registry.standing import NOT_THERE, Standing, address, resolve
from components.registry.withdrawals import open_takedown

AUTHENTICATED = "MLflow user, authenticated by the server"


@dataclass(frozen=True)
class Decision:
    """What a decision did.

    Attributes:
        name: released model.
        action: `promote`, `reject` or `rollback`.
        version: address of what it is about: the champion now, or the rejected candidate.
        candidate: the candidate that the version was made from.
        digest: SHA-256 of the model's files.
        source: where its bytes are.
        previous: address of the version that a rollback returns to; None: there is none.
        event: the audit entry that says so.
        changed: it is new; else all was as asked already, such as after a call that was killed at its end.
        settled: an earlier change that was cut short was finished first.
        unexplained: what the registry said and no audit event explains.
    """

    name: str
    action: str
    version: str
    candidate: str
    digest: str
    source: str
    previous: str | None
    event: Entry
    changed: bool
    settled: bool
    unexplained: list[str]


def promote(
    reference: str, reason: str, root: Path = Path(), waivers: Mapping[str, str] | None = None, actor: str | None = None
) -> Decision:
    """Make a version the champion of its model, if no gate fails or each that does is waived.

    Args:
        reference: `NAME@latest` for the newest candidate, `NAME-candidates/3`, or a released version `NAME/2`.
        reason: why; it goes into the audit log.
        root: a clone of the repository whose commits made the version, for its trace.
        waivers: for each failed gate that is waived, why.
        actor: who decides; None finds it out, see `who`.

    Raises:
        ConfigError: no reason, a waiver of what is no gate or does not fail, or what is no reference.
        RegistryError: no such version, a gate fails, bytes that are not those that were registered, or a refusal.
        RecordError: the audit log is broken or does not take the event; the alias has not moved then.
    """
    waivers = waivers or {}
    _check_words(PROMOTE, reason, waivers)
    with _deciding(reference) as (standing, version, settled):
        by = who(actor)
        unexplained = standing.unexplained()
        signed = Released().is_signed(standing.name, _digest(version))
        if _is_champion(standing, version) and signed and not unexplained:
            champion = resolve(standing.client, str(standing.champion))
            event = _approval(standing, address(champion))
            return _decision(standing, champion, event, settled, unexplained, changed=False)
        authenticated = by["actor_from"] == AUTHENTICATED
        reviewed = review(standing, version, root, by["actor"], authenticated)
        _check_gates(reviewed, waivers, authenticated)
        released = _release(standing, version)
        details: dict[str, Any] = {
            "reason": reason.strip(),
            "gates": {gate.name: [gate.state, gate.text] for gate in reviewed.gates},
            "waived": dict(waivers),
            "scores": reviewed.facts.metrics(),
            "unexplained": unexplained,
        }
        after, event = _change(standing, PROMOTE, released, by, details)
        _tag_candidate(after.client, released.tags[Tag.CANDIDATE], Tag.RELEASED, address(released))
    return _decision(after, released, event, settled, unexplained)


def reject(reference: str, reason: str, actor: str | None = None) -> Decision:
    """Record that a candidate shall not become the champion; from then on its gate `rejection` fails.

    The same rejection by the same actor for the same reason is recorded once: after a crash it can be run again.

    Raises:
        ConfigError: no reason, or what is no candidate.
        RegistryError: no such version.
        RecordError: the audit log is broken or does not take the event.
    """
    _check_words(REJECT, reason, {})
    with _deciding(reference) as (standing, version, settled):
        by = who(actor)
        if not ModelReference(str(version.name)).is_candidate:
            raise ConfigError(f"{address(version)}: is released; `pedigree rollback {standing.name}` takes it back")
        details = {"reason": reason.strip(), "actor_from": by["actor_from"], "run": version.run_id}
        details["digest"] = version.tags.get(Tag.DIGEST, "")
        about = (entry for entry in reversed(standing.entries) if entry.subject == address(version))
        last = next((entry for entry in about if entry.action in DECISIONS), None)
        if last and _is_repeat(last, REJECT, by, reason):
            after, event = standing, last
        else:
            after = standing.record(Event(standing.name, REJECT, address(version), by["actor"], details))
            event = after.entries[-1]
        after.anchor()
        _tag_candidate(after.client, address(version), Tag.REJECTED, f"{by['actor']}, event {event.sequence}: {reason}")
        return _decision(after, version, event, settled, after.unexplained(), changed=event is not last)


def rollback(name: str, reason: str, actor: str | None = None) -> Decision:
    """Make the champion before the present one the champion again: its released bytes, verified, and nothing else.

    The same rollback by the same actor for the same reason is done once: after a crash it can be run again.

    Args:
        name: released model.
        reason: why; it goes into the audit log.
        actor: as of `promote`.

    Raises:
        ConfigError: no reason.
        RegistryError: there is no earlier champion, or its bytes are not those that its event approved.
        RecordError: as for `promote`.
    """
    _check_words(ROLLBACK, reason, {})
    with one_line_errors():
        standing, by = Standing.read(name), who(actor)
        settled = standing.settle()
        last = next((entry for entry in reversed(standing.entries) if entry.action in CHANGES), None)
        if last and _is_repeat(last, ROLLBACK, by, reason):
            return _decision(standing, resolve(standing.client, last.subject), last, settled, [], changed=False)
        if standing.previous is None:
            now = f"{standing.champion} is the first champion" if standing.champion else "it has no champion"
            raise RegistryError(f"{name}: no earlier champion to return to; {now}")
        unexplained = standing.unexplained()
        version = resolve(standing.client, standing.previous)
        names = {address(version), version.tags.get(Tag.CANDIDATE, "")}
        if found := open_takedown(version, standing.entries, names, Path.cwd()):
            raise RegistryError(f"{address(version)}: has an open takedown, {found}; promote another version")
        _check_released(standing, version)
        after, event = _change(standing, ROLLBACK, version, by, {"reason": reason.strip(), "unexplained": unexplained})
    return _decision(after, version, event, settled, unexplained)


def who(actor: str | None) -> dict[str, str]:
    """The person who acts, and how that is known: MLflow's user, unless many share it, then whom git knows."""
    if actor:
        return {"actor": actor, "actor_from": "as typed, not authenticated"}
    login = authenticated_user()
    if login and login not in SHARED_LOGINS:
        return {"actor": login, "actor_from": AUTHENTICATED}
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
    if others := differing(stated, found):
        raise RegistryError(
            f"{address(version)}: not the bytes that were registered: {', '.join(others[:5])} "
            f"({len(others)} of {len(stated)} files); nothing was changed"
        )
    weights = {sha256 for path, sha256 in found.items() if path.endswith(f"/{WEIGHTS_FILE}")}
    if digest_of(found) != version.tags.get(Tag.DIGEST) or weights != {version.tags.get(Tag.WEIGHTS_SHA256)}:
        raise RegistryError(
            f"{address(version)}: its tags contradict each other ({Tag.FILES}, {Tag.DIGEST}); register it again"
        )
    return found


@contextmanager
def _deciding(reference: str) -> Iterator[tuple[Standing, ModelVersion, bool]]:
    """The version that is decided on, and how its model stands once a change that was cut short is finished."""
    with one_line_errors():
        version = resolve(registry_client(), reference)
        standing = Standing.read(ModelReference(str(version.name)).model)
        yield standing, version, standing.settle()


def _check_words(action: str, reason: str, waivers: Mapping[str, str]) -> None:
    if not reason.strip():
        raise ConfigError(f"a {action} needs a reason, which goes into the audit log: --reason TEXT")
    for gate, why in waivers.items():
        if gate not in GATES:
            raise ConfigError(f"no gate is called {gate!r}; the gates are {', '.join(GATES)}")
        if not why.strip():
            raise ConfigError(f"a waiver of the gate {gate} needs a reason: --waive {gate}=TEXT")


def _check_gates(reviewed: Review, waivers: Mapping[str, str], authenticated: bool) -> None:
    bad = {gate.name: gate.text for gate in failed(reviewed.gates)}
    if needless := sorted(set(waivers) - set(bad)):
        raise ConfigError(f"the gate {needless[0]} does not fail, so it needs no waiver")
    if SECOND_PERSON in waivers and not authenticated:
        raise RegistryError(f"the gate {SECOND_PERSON} is waived by an authenticated person only, by {AS_A_USER}")
    if left := {name: text for name, text in bad.items() if name not in waivers}:
        told = "; ".join(f"{name}: {text}" for name, text in left.items())
        raise RegistryError(
            f"{reviewed.version} does not pass {len(left)} of {len(reviewed.gates)} gates: {told}. Nothing was "
            f"changed; reject it, or waive with --waive {next(iter(left))}=REASON"
        )


def _is_repeat(event: Entry, action: str, by: Mapping[str, str], reason: str) -> bool:
    """Whether an event is what the same actor decides for the same reason once more, as after a crash."""
    return (event.action, event.actor, event.details.get("reason")) == (action, by["actor"], reason.strip())


def _is_champion(standing: Standing, version: ModelVersion) -> bool:
    if standing.champion is None:
        return False
    event = _approval(standing, standing.champion)
    same = (event.details.get("candidate"), event.details.get("digest")) == (address(version), _digest(version))
    return same or standing.champion == address(version)


def _approval(standing: Standing, version: str) -> Entry:
    """The last event that let a released version in."""
    found = next((e for e in reversed(standing.entries) if e.subject == version and e.action in CHANGES), None)
    if found is None:
        raise RegistryError(f"{version}: no audit event lets it in; promote the candidate that it was made from")
    return found


def _digest(version: ModelVersion) -> str:
    digest = version.tags.get(Tag.DIGEST)
    if not digest:
        raise RegistryError(f"{address(version)}: has no tag {Tag.DIGEST}, so its bytes cannot be checked")
    return digest


def _release(standing: Standing, version: ModelVersion) -> ModelVersion:
    """The released version: of a candidate its verified bytes are copied, of a released one they are verified."""
    if not ModelReference(str(version.name)).is_candidate:
        _check_released(standing, version)
        return version
    source = _copy_bytes(Released(), version, standing.name, _digest(version))
    return _released_version(standing.client, standing.name, version, source)


def _check_released(standing: Standing, version: ModelVersion) -> None:
    """Refuse released bytes that are not those that an event approved."""
    event = _approval(standing, address(version))
    with tempfile.TemporaryDirectory() as temporary:
        folder = download_model(str(event.details["source"]), Path(temporary))
        found = verify_files(folder, version)
        verify_folder(folder)
    if digest_of(found) != event.details["digest"]:
        raise RegistryError(f"{address(version)}: not the bytes that event {event.sequence} approved")


def _copy_bytes(released: Released, candidate: ModelVersion, name: str, digest: str) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = download_model(str(candidate.source), Path(temporary))
        files = verify_files(folder, candidate)
        return released.copy_in(folder, files, name, digest)


def _released_version(client: MlflowClient, name: str, candidate: ModelVersion, source: str) -> ModelVersion:
    described = f"Released by a person each. `pedigree trace {name}@champion` says what the one in use was made from."
    ensure_registered_model(client, name, described)
    made = versions(client, name, DIGEST=candidate.tags[Tag.DIGEST], CANDIDATE=address(candidate))
    if made := [version for version in made if str(version.source) == source]:
        return min(made, key=lambda v: int(v.version))
    tags = {**candidate.tags, Tag.CANDIDATE: address(candidate)}
    return client.create_model_version(
        name, source=source, run_id=candidate.run_id, tags=tags, description=candidate.description
    )


def _change(
    standing: Standing,
    action: str,
    version: ModelVersion,
    by: Mapping[str, str],
    details: Mapping[str, Any],
) -> tuple[Standing, Entry]:
    """Write the event of a new champion, then move the aliases to where the log has them."""
    details = {
        **details,
        "actor_from": by["actor_from"],
        "candidate": version.tags[Tag.CANDIDATE],
        "digest": _digest(version),
        "source": str(version.source),
        "run": version.run_id,
        "previous": standing.champion,
        "signature": Released().signature(standing.name, _digest(version)),
    }
    after = standing.record(Event(standing.name, action, address(version), by["actor"], details))
    event = after.entries[-1]
    after.client.set_model_version_tag(standing.name, version.version, Tag.AUDIT, f"{event.sequence}:{event.hash}")
    after.move_aliases()
    after.anchor()
    return after, event


def _tag_candidate(client: MlflowClient, candidate: str, tag: Tag, value: str) -> None:
    """Say on the candidate's page what was decided; nothing where the candidate was deleted meanwhile."""
    asked = ModelReference.parse(candidate)
    assert asked is not None
    try:
        client.set_model_version_tag(asked.name, asked.version, tag, value)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise


def _decision(
    standing: Standing,
    version: ModelVersion,
    event: Entry,
    settled: bool,
    unexplained: list[str],
    changed: bool = True,
) -> Decision:
    return Decision(
        name=standing.name,
        action=event.action,
        version=address(version),
        candidate=version.tags.get(Tag.CANDIDATE, address(version)),
        digest=version.tags.get(Tag.DIGEST, ""),
        source=str(version.source),
        previous=standing.previous,
        event=event,
        changed=changed,
        settled=settled,
        unexplained=unexplained,
    )
