"""Verify the whole audit log and list every fault; write it to a file that can be verified without S3.

A file has JSON lines: first the bucket and the public keys, then each object's key, lock and bytes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from components.core.audit_keys import AUDIT_PUBLIC_KEYS, AuditKeyError, PublicKey, keys_of, trusted_keys
from components.core.errors import InputError
from components.core.storage import write_bytes
from components.lineage.audit_anchors import Anchor
from components.lineage.audit_chain import Entry, Head, Keys, chain_prefix, examine, key_at
from components.lineage.audit_log import AuditLog, Fetched, Stored
from components.lineage.lock_file import RecordError

FORMAT = "pedigree-audit/1"


@dataclass
class Checked:
    """One chain.

    Attributes:
        entries: those that can be read, oldest first.
        unsigned: how many of them are of before signatures.
        faults: what is wrong, each with the object.
        until: the end of the shortest lock; None where nothing is locked.
    """

    chain: str
    entries: list[Entry] = field(default_factory=list)
    unsigned: int = 0
    faults: list[str] = field(default_factory=list)
    until: datetime.datetime | None = None


@dataclass(frozen=True)
class AuditReport:
    """What a verification found.

    Attributes:
        place: bucket or file.
        anchors: how many were compared.
        notes: what limits the result.
    """

    place: str
    chains: list[Checked]
    anchors: int
    notes: list[str]

    @property
    def faults(self) -> list[str]:
        """All faults."""
        return [fault for chain in self.chains for fault in chain.faults]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        chains = [
            {
                "chain": one.chain,
                "events": len(one.entries),
                "unsigned": one.unsigned,
                "head": one.entries[-1].hash if one.entries else None,
                "locked_until": one.until,
                "faults": one.faults,
            }
            for one in self.chains
        ]
        return {"log": self.place, "holds": not self.faults, "anchors": self.anchors, "notes": self.notes,
                "chains": chains}  # fmt: skip


def verify_log(log: AuditLog, anchors: Sequence[Anchor]) -> AuditReport:
    """Check every chain: hashes, order, signatures, locks, second versions and delete markers, and the anchors.

    Raises:
        StorageError: S3 does not answer.
        AuditKeyError: there are signed events and no trusted keys.
    """
    keys, chains = cache(trusted_keys), []
    names = sorted({*log.names(), *(anchor.chain for anchor in anchors)})
    for name in names:
        try:
            chain_prefix(name)
        except RecordError as error:
            chains.append(Checked(name, faults=[str(error)]))
            continue
        listed = [*log.stored(name)][::-1]  # of a key the first version first
        listed.sort(key=lambda item: item.key)
        objects = [item for item in listed if item.deleted is None]
        found = _check(name, zip(objects, log.fetch(objects), strict=True), keys)
        found.faults += [
            f"{item.key}: deleted on {item.deleted:%Y-%m-%d %H:%M:%S}" for item in listed if item.deleted is not None
        ]
        _compare(found, anchors)
        chains.append(found)
    return AuditReport(f"s3://{log.bucket}", chains, len(anchors), [])


def _check(name: str, objects: Iterable[tuple[Stored, Fetched]], keys: Keys) -> Checked:
    found, head, before = Checked(name), Head(), ""
    for stored, fetched in objects:
        key = stored.key
        if key == before:
            found.faults.append(f"{key}: overwritten: it has more than one version")
            continue
        if key != (wanted := key_at(name, head.sequence + 1)):
            found.faults.append(f"{wanted}: missing; the next one found is {key}")
        before = key
        entry, faults = examine(head, key, fetched.body, keys)
        found.faults += [f"{key}: {fault}" for fault in faults]
        found.faults += _lock_faults(key, fetched)
        found.until = min(filter(None, (found.until, fetched.until)), default=None)
        if entry is None:
            head = Head(head.sequence + 1, "", head.signed)
            continue
        found.entries.append(entry)
        found.unsigned += entry.signature is None
        head = head.then(entry)
    return found


def _lock_faults(key: str, fetched: Fetched) -> Iterator[str]:
    if fetched.lock is None or fetched.until is None:
        yield f"{key}: not locked, so it can be deleted"
    elif fetched.until < datetime.datetime.now(datetime.UTC):
        yield f"{key}: its lock ended on {fetched.until:%Y-%m-%d}"


def _compare(found: Checked, anchors: Iterable[Anchor]) -> None:
    for anchor in anchors:
        if anchor.chain == found.chain and (fault := anchor.fault(found.entries)):
            found.faults.append(f"{key_at(found.chain, anchor.sequence)}: {fault}")


def export_log(log: AuditLog, target: Path) -> int:
    """Write all events with their locks, and the public keys, to a file; return the number of events.

    Raises:
        RecordError: a chain is broken.
        StorageError: S3 does not answer.
    """
    keys: dict[str, PublicKey] = {}
    lines: list[dict[str, Any]] = []
    for name in sorted(log.names()):
        entries = log.read(name)
        if any(entry.signature for entry in entries):
            keys = keys or trusted_keys()
        locks = log.fetch(list(log.stored(name)))
        for entry, fetched in zip(entries, locks, strict=False):
            until = fetched.until.isoformat() if fetched.until else None
            lines.append(
                {"object": key_at(name, entry.sequence), "lock": fetched.lock, "until": until,
                 "body": fetched.body.decode()}
            )  # fmt: skip
    pems = [{"id": id_, "name": key.name, "pem": key.pem} for id_, key in keys.items()]
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"format": FORMAT, "bucket": log.bucket, "made": made, "events": len(lines), "keys": pems}
    write_bytes(target, "".join(json.dumps(line, sort_keys=True) + "\n" for line in (head, *lines)).encode())
    return len(lines)


def verify_file(file: Path) -> AuditReport:
    """Check the chains in a file that `export_log` wrote, without S3.

    The trusted keys count where they are named, else those in the file, which a note then says.

    Raises:
        InputError: it is no such file.
    """
    head, rows = _read(file)
    pems: dict[str, str] = {}
    for key in head["keys"]:
        pems[key["name"]] = pems.get(key["name"], "") + key["pem"]
    own = keys_of(pems)
    notes = [] if len(rows) == head["events"] else [f"{file} has {len(rows)} of {head['events']} events: it is cut off"]
    try:
        trusted = trusted_keys()
    except AuditKeyError:
        trusted = own
        ids = ", ".join(f"{key.name} {id_}" for id_, key in own.items()) or "none"
        notes.append(f"{AUDIT_PUBLIC_KEYS} names no keys, so those in the file were used; compare their ids: {ids}")
    chains: dict[str, list[tuple[Stored, Fetched]]] = {}
    for row in rows:
        until = datetime.datetime.fromisoformat(row["until"]) if row["until"] else None
        found = (Stored(row["object"], ""), Fetched(row["body"].encode(), row["lock"], until))
        chains.setdefault(row["object"].split("/")[1], []).append(found)
    checked = [_check(name, objects, lambda: trusted) for name, objects in chains.items()]
    if len(rows) != head["events"]:
        checked.append(Checked(str(file), faults=notes[:1]))
    return AuditReport(str(file), checked, 0, notes)


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        head, *rows = [json.loads(line) for line in file.read_text().splitlines()]
        if head["format"] != FORMAT or not all({"object", "lock", "until", "body"} <= row.keys() for row in rows):
            raise ValueError
        _ = [head["keys"], head["events"], *(chain_prefix(row["object"].split("/")[1]) for row in rows)]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecordError):
        raise InputError(f"{file}: not a file that `pedigree audit export` wrote") from None
    return head, rows
