"""The form of audit events, and what makes a chain of them: hashes, order and signatures. Nothing here asks S3.

An event's `hash` is the SHA-256 of the canonical JSON of all its fields but `hash` and `signature`; its signature is
over that hash. Events of before signatures existed have neither key nor signature; none may follow a signed one.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from components.core.audit_keys import AUDIT_PUBLIC_KEYS, PublicKey, Signer
from components.core.references import MODEL_NAME
from components.core.user import TRAINER
from components.lineage.lock_file import RecordError

PLATFORM = "_platform"  # chain of events that concern no single model, such as an ingest; no model can have this name
PROMOTE, REJECT, ROLLBACK = "promote", "reject", "rollback"
REGISTER = "register"  # of a candidate, in the chain of NAME-candidates
DECISIONS = (PROMOTE, REJECT, ROLLBACK)
TAKEDOWN = "takedown"  # of images that a version may have learned; no decision on the version
PURGE = "purge"  # of bytes; `verify` misses none of what it names
NOT_A_RUNS = (*DECISIONS, TAKEDOWN, PURGE)  # which a run's key may not sign
GENESIS = "0" * 64
TEXTS = ("name", "previous", "time", "actor", "action", "subject", "hash")
OPTIONAL = ("key", "signature")
Keys = Callable[[], Mapping[str, PublicKey]]  # trusted keys by id, read when the first signed event is met


@dataclass(frozen=True)
class Event:
    """An action: `actor` did `action` to `subject`, a version of the model `name`."""

    name: str
    action: str
    subject: str
    actor: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An event in the log; `key` is the id of the key that signed it."""

    name: str
    sequence: int
    previous: str
    time: str
    actor: str
    action: str
    subject: str
    details: dict[str, Any]
    hash: str
    key: str | None = None
    signature: str | None = None

    @property
    def body(self) -> bytes:
        """Its bytes in the log."""
        values = dataclasses.asdict(self)
        return canonical({k: v for k, v in values.items() if k not in OPTIONAL or v is not None})


@dataclass(frozen=True)
class Head:
    """The last entry of a chain, or of its beginning; `signed` says whether any entry up to it is signed."""

    sequence: int = 0
    hash: str = GENESIS
    signed: bool = False

    def then(self, entry: Entry) -> Head:
        """Return the head after one more entry."""
        return Head(entry.sequence, entry.hash, self.signed or entry.signature is not None)


def next_entry(event: Event, head: Head, signer: Signer | None) -> Entry:
    """Make the entry that follows the head, signed if there is a key."""
    values: dict[str, Any] = {
        **dataclasses.asdict(event),
        "details": dict(event.details),
        "sequence": head.sequence + 1,
        "previous": head.hash,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "key": signer.id if signer else None,
    }
    entry = Entry(**values, hash="")
    entry = dataclasses.replace(entry, hash=hash_of(entry))
    return dataclasses.replace(entry, signature=signer.sign(entry.hash)) if signer else entry


def parse(body: bytes) -> Entry | None:
    """Return the entry of these bytes; None if they are none."""
    try:
        entry = Entry(**json.loads(body))
        canonical(dataclasses.asdict(entry))  # refuses NaN and half characters
    except (ValueError, TypeError):
        return None
    texts = [*(getattr(entry, name) for name in TEXTS), *(getattr(entry, name) or "" for name in OPTIONAL)]
    right = all(isinstance(text, str) for text in texts) and isinstance(entry.details, dict)
    return entry if right and type(entry.sequence) is int else None


def examine(before: Head, key: str, body: bytes, keys: Keys) -> tuple[Entry | None, list[str]]:
    """Return the entry in the bytes of an object, and what is wrong with it as the one after `before`."""
    entry = parse(body)
    if entry is None:
        return None, ["not an audit entry"]
    faults = []
    if entry.hash != hash_of(entry):
        faults.append(f"its content no longer matches its hash {entry.hash[:12]}")
    if entry.previous != before.hash:
        faults.append("does not continue the entry before it")
    if _place(entry.name, entry.sequence) != key:
        faults.append(f"says that it is entry {entry.sequence} of {entry.name}")
    signature = _signature_fault(entry, before, keys)
    return entry, [*faults, signature] if signature else faults


def _signature_fault(entry: Entry, before: Head, keys: Keys) -> str | None:
    if entry.signature is None or entry.key is None:
        return "not signed, but an entry before it is" if before.signed else None
    key = keys().get(entry.key)
    if key is None:
        known = f"{AUDIT_PUBLIC_KEYS} names the known ones"
        return f"signed as {entry.actor} with the unknown key {entry.key[:12]}; {known}"
    if not key.verifies(entry.hash, entry.signature):
        return f"its signature is not that of the {key.name}'s key"
    if key.name == TRAINER and entry.action in NOT_A_RUNS:
        return f"the {entry.action} of {entry.subject} is signed with the {TRAINER}'s key, which may not decide"
    return None


def hash_of(entry: Entry) -> str:
    """Return the hash that an entry should have."""
    left = {"hash", "signature"} | (set() if entry.key is not None else {"key"})
    values = {key: value for key, value in dataclasses.asdict(entry).items() if key not in left}
    return hashlib.sha256(canonical(values)).hexdigest()


def canonical(values: Mapping[str, Any]) -> bytes:
    """Return the one JSON text of these values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def chain_prefix(name: str) -> str:
    """Return the prefix of a chain's objects.

    Raises:
        RecordError: no chain can have this name.
    """
    if name != PLATFORM and not MODEL_NAME.fullmatch(name):
        raise RecordError(f"{name!r} is not a model name: letters, digits, dot, dash and underscore are allowed")
    return f"events/{name}/"


def key_at(name: str, sequence: int) -> str:
    """Return the key of a chain's entry, with the check of `chain_prefix`."""
    chain_prefix(name)
    return _place(name, sequence)


def _place(name: str, sequence: int) -> str:
    return f"events/{name}/{sequence:08d}.json"
