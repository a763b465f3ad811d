"""The audit log: who did what to which model, as hash-chained, signed objects in an object-locked S3 bucket.

Each event is one object, `events/<chain>/<sequence>.json`, with the hash of the event before it, so that readers detect
changed, removed or inserted events. Events are written with `If-None-Match: *`, so that two writers cannot use the same
sequence number. Retention is the bucket's default, which its owner sets and the writer cannot weaken; in a bucket
without a default each event is locked for ten years in governance mode. A bucket without object lock is refused.
`audit_chain.py` has the form of an event, `audit_heads.py` what this checkout has verified already.
"""

from __future__ import annotations

import datetime
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from botocore.exceptions import ClientError

from components.core.audit_keys import AUDIT_KEY, own_signer, trusted_keys
from components.core.storage import s3_client, s3_errors
from components.lineage.audit_chain import (
    GENESIS,
    PLATFORM,
    Entry,
    Event,
    Head,
    chain_prefix,
    examine,
    hash_of,
    key_at,
    next_entry,
    parse,
)
from components.lineage.audit_heads import Heads, heads_folder
from components.lineage.lock_file import RecordError

__all__ = ["GENESIS", "PLATFORM", "AuditLog", "Entry", "Event", "OvertakenError", "open_log"]

BUCKET_VARIABLE = "PEDIGREE_AUDIT_BUCKET"
ATTEMPTS = 100
MOST_WAIT_SECONDS = 0.05  # for an entry that another writer is putting
READERS = 8  # S3 requests at once
NO_LOCK = "ObjectLockConfigurationNotFoundError"
RETENTION = datetime.timedelta(days=3653)  # EU AI Act, art. 18: ten years

logger = logging.getLogger(__name__)


class OvertakenError(RecordError):
    """Another event was appended first, so the decision was made without knowing it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        super().__init__(
            f"event {entry.sequence} came first: {entry.action} of {entry.subject} by {entry.actor}, "
            f"{entry.details.get('reason', '')!r}; look again, then decide again"
        )


@dataclass(frozen=True)
class Stored:
    """A version of an object in the bucket, or the marker of its deletion at a time."""

    key: str
    version: str
    deleted: datetime.datetime | None = None


@dataclass(frozen=True)
class Fetched:
    """An object's bytes and its lock."""

    body: bytes
    lock: str | None
    until: datetime.datetime | None


class AuditLog:
    """The events of all models in one bucket.

    Args:
        bucket: name of the object-locked bucket; the standard AWS variables set endpoint and credentials.
        heads: what this checkout has verified; by default of the folder that this process works in.
    """

    def __init__(self, bucket: str, heads: Heads | None = None) -> None:
        self.bucket = bucket
        self._place = f"audit log s3://{bucket}"
        self._client = s3_client()
        self._heads = heads or Heads(bucket, heads_folder())
        self._owner_retains: bool | None = None

    @classmethod
    def from_environment(cls) -> AuditLog:
        """Return the log in the bucket that PEDIGREE_AUDIT_BUCKET names.

        Raises:
            RecordError: the variable is not set.
        """
        bucket = os.environ.get(BUCKET_VARIABLE)
        if not bucket:
            raise RecordError(f"{BUCKET_VARIABLE} is not set: name the object-locked bucket, or run `pedigree up`")
        return cls(bucket)

    def append(self, event: Event, after: int | None = None) -> Entry:
        """Verify the chain of the event's model from this checkout's checkpoint on, and append the event, signed.

        Args:
            event: what was done, or is about to be.
            after: number of events that the actor has seen; more events are an error.

        Raises:
            RecordError: the chain is broken, the bucket has no object lock, or another event came first.
            AuditKeyError: there is no key to sign with, or none to verify with.
            StorageError: S3 refuses or does not answer, as in `read`.
        """
        lock, signer = self._lock(), own_signer()
        head, newer = self._advance(event.name)
        for _ in range(ATTEMPTS):
            if after is not None and head.sequence != after:
                raise self._moved(event.name, head, newer, after)
            if head.signed and signer is None:
                raise RecordError(
                    f"{AUDIT_KEY} is not set, and the events of {event.name} are signed: name the PEM file with your "
                    "key, or run `pedigree up`"
                )
            entry = next_entry(event, head, signer)
            _, faults = examine(head, key_at(event.name, entry.sequence), entry.body, trusted_keys)
            if faults:  # it could never be taken away again
                raise RecordError(f"event not written to s3://{self.bucket}/events/{event.name}: {faults[0]}")
            if self._put(entry, lock):
                self._heads.put(event.name, head.then(entry))
                return entry
            # Read on to the end before the next try: a put that is refused takes longer than another writer's append,
            # so who only learned of one entry a try could lose them all.
            newer = []
            while first := self._next(event.name, head):
                head, newer = head.then(first), [*newer, first]
            if not newer:
                time.sleep(random.uniform(0, MOST_WAIT_SECONDS))
        raise RecordError(f"s3://{self.bucket}/events/{event.name}: lost the race {ATTEMPTS} times; try again")

    def head(self, name: str) -> Head:
        """Return the last entry of a chain, verified as by `append`; raises the same errors."""
        return self._advance(name)[0]

    def check(self, name: str) -> None:
        """Raise what an append to the chain would raise, without appending."""
        self._lock()
        own_signer()
        self.head(name)

    def verified_heads(self) -> dict[str, Head]:
        """Return the heads that this checkout has verified last, by chain, without asking S3."""
        return self._heads.known()

    def read(self, name: str) -> list[Entry]:
        """Return the verified events of the model `name`, oldest first; empty if there are none.

        Raises:
            RecordError: an entry was changed, replaced, deleted or moved, or is not signed by a known key; the message
                names it.
        """
        seen = self._heads.get(name)  # before the listing: another process may append meanwhile
        objects = self._objects(name)
        entries, head = self._verified(objects, Head(), name)
        if len(entries) < seen.sequence or (seen.sequence and entries[seen.sequence - 1].hash != seen.hash):
            raise self._contradicted(name, seen, len(entries) < seen.sequence)
        if head.sequence > seen.sequence:
            self._heads.put(name, head)
        return entries

    def names(self) -> list[str]:
        """Return the names of models with events."""
        query = {"Bucket": self.bucket, "Prefix": "events/", "Delimiter": "/"}
        with s3_errors(self._place):
            pages = self._client.get_paginator("list_object_versions").paginate(**query)
            return [p["Prefix"].split("/")[1] for page in pages for p in page.get("CommonPrefixes", [])]

    def stored(self, name: str, after: str = "") -> Iterator[Stored]:
        """List what the bucket holds of a chain, from the first key after `after` on: all versions and markers."""
        query = {"Bucket": self.bucket, "Prefix": chain_prefix(name), **({"KeyMarker": after} if after else {})}
        with s3_errors(self._place):
            for page in self._client.get_paginator("list_object_versions").paginate(**query):
                for marker in page.get("DeleteMarkers", []):
                    yield Stored(marker["Key"], marker["VersionId"], marker["LastModified"])
                for item in page.get("Versions", []):
                    yield Stored(item["Key"], item["VersionId"])

    def fetch(self, objects: Sequence[Stored]) -> list[Fetched]:
        """Read objects, several at once."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._fetch, objects)) if len(objects) > 1 else [self._fetch(o) for o in objects]

    def broken(self, key: str, what: str) -> RecordError:
        """Return the error that names an object of the log."""
        return RecordError(f"audit log broken at s3://{self.bucket}/{key}: {what}")

    def _advance(self, name: str) -> tuple[Head, list[Entry]]:
        """Verify what follows the checkpoint; return the head now, and the entries after the checkpoint."""
        seen = self._heads.get(name)
        objects = self._objects(name, key_at(name, seen.sequence - 1) if seen.sequence else "")
        if seen.sequence:
            if not objects or objects[0].key != key_at(name, seen.sequence):
                raise self._contradicted(name, seen, cut=True)
            last = parse(self._fetch(objects[0]).body)
            if last is None or not last.hash == hash_of(last) == seen.hash:
                raise self._contradicted(name, seen, cut=False)
        newer, head = self._verified(objects[1:] if seen.sequence else objects, seen, name)
        if newer:
            self._heads.put(name, head)
        return head, newer

    def _next(self, name: str, head: Head) -> Entry | None:
        """Return the verified entry after the head; None if there is none yet."""
        key = key_at(name, head.sequence + 1)
        with s3_errors(self._place):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None
        entry, faults = examine(head, key, body, trusted_keys)
        if entry is None or faults:
            raise self.broken(key, faults[0])
        return entry

    def _verified(self, objects: Sequence[Stored], head: Head, name: str) -> tuple[list[Entry], Head]:
        """Verify the entries after a head; return them, and the head after them."""
        entries: list[Entry] = []
        keys = cache(trusted_keys)
        for found, fetched in zip(objects, self.fetch(objects), strict=True):
            wanted = key_at(name, head.sequence + 1)
            if found.key != wanted:
                raise self.broken(wanted, f"missing; the next one found is {found.key}")
            entry, faults = examine(head, found.key, fetched.body, keys)
            if entry is None or faults:
                raise self.broken(found.key, faults[0])
            entries.append(entry)
            head = head.then(entry)
        return entries, head

    def _objects(self, name: str, after: str = "") -> list[Stored]:
        """Return the objects of a chain, in order; raise on a second version or a delete marker."""
        found: dict[str, Stored] = {}
        for item in self.stored(name, after):
            if item.deleted:
                raise self.broken(item.key, f"deleted on {item.deleted:%Y-%m-%d %H:%M:%S}")
            if item.key in found:
                raise self.broken(item.key, "overwritten: it has more than one version")
            found[item.key] = item
        return [found[key] for key in sorted(found)]

    def _contradicted(self, name: str, seen: Head, cut: bool) -> RecordError:
        what = "missing: the end of the chain was cut off" if cut else "replaced: another entry than before"
        return self.broken(key_at(name, seen.sequence), f"{what}; {self._heads.where(name)}")

    def _moved(self, name: str, head: Head, newer: Sequence[Entry], after: int) -> RecordError:
        """Return the error for a chain that is not as long as the actor has seen it."""
        if head.sequence < after:
            return self.broken(key_at(name, head.sequence + 1), "missing: the end of the chain was cut off meanwhile")
        first = next((entry for entry in newer if entry.sequence == after + 1), None)
        if first is None:  # it is before the checkpoint, so it was verified
            with s3_errors(self._place):
                body = self._client.get_object(Bucket=self.bucket, Key=key_at(name, after + 1))["Body"].read()
            first = parse(body)
        return OvertakenError(first) if first else self.broken(key_at(name, after + 1), "not an audit entry")

    def _fetch(self, found: Stored) -> Fetched:
        with s3_errors(self._place):
            got = self._client.get_object(Bucket=self.bucket, Key=found.key, VersionId=found.version)
            return Fetched(got["Body"].read(), got.get("ObjectLockMode"), got.get("ObjectLockRetainUntilDate"))

    def _put(self, entry: Entry, lock: Mapping[str, Any]) -> bool:
        """Write the object unless the key exists; return whether it holds these bytes, also after a resent request."""
        key, body = key_at(entry.name, entry.sequence), entry.body
        with s3_errors(self._place):
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=key, Body=body, ContentType="application/json", IfNoneMatch="*", **lock
                )
            except ClientError as error:
                # 409: on AWS, a concurrent conditional put of the same key.
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in {409, 412}:
                    raise
                return self._is(key, body)
        return True

    def _is(self, key: str, body: bytes) -> bool:
        try:
            return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read() == body
        except self._client.exceptions.NoSuchKey:
            return False

    def _lock(self) -> dict[str, Any]:
        """Return the lock options of a put; none if the bucket has a default retention."""
        if self._owner_retains is None:
            self._owner_retains = "DefaultRetention" in self._lock_configuration().get("Rule", {})
        if self._owner_retains:
            return {}
        until = datetime.datetime.now(datetime.UTC) + RETENTION
        return {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": until}

    def _lock_configuration(self) -> dict[str, Any]:
        with s3_errors(self._place):
            try:
                return self._client.get_object_lock_configuration(Bucket=self.bucket)["ObjectLockConfiguration"]
            except ClientError as error:
                if error.response["Error"]["Code"] != NO_LOCK:
                    raise
        raise RecordError(
            f"s3://{self.bucket} has no object lock, so an event could be deleted; make the audit bucket with one"
        )


def open_log() -> AuditLog | None:
    """Return the log; None, with one warning a process, if PEDIGREE_AUDIT_BUCKET is not set."""
    if os.environ.get(BUCKET_VARIABLE):
        return AuditLog.from_environment()
    _warn_of_no_log()
    return None


@cache
def _warn_of_no_log() -> None:
    logger.warning("%s is not set: nothing is recorded in an audit log", BUCKET_VARIABLE)
