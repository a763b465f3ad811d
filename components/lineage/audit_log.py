"""The audit log: who did what to which model, as hash-chained objects in an object-locked S3 bucket.

Each event is one object, `events/<name>/<sequence>.json`, with the hash of the previous event, so that readers detect
changed, removed or inserted events. Events are written with `If-None-Match: *`, so that two writers cannot use the same
sequence number. Retention is the bucket's default, which its owner sets and the writer cannot weaken; in a bucket
without a default each event is locked for ten years in governance mode. A bucket without object lock is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import ClientError

from components.core.references import MODEL_NAME
from components.core.storage import s3_client, s3_errors
from components.lineage.lock_file import RecordError

BUCKET_VARIABLE = "PEDIGREE_AUDIT_BUCKET"
PLATFORM = "_platform"  # chain of the events that concern no single model, such as an ingest; no model can have this name
GENESIS = "0" * 64
ATTEMPTS = 20
NO_LOCK = "ObjectLockConfigurationNotFoundError"
RETENTION = datetime.timedelta(days=3653)  # EU AI Act, art. 18: ten years


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
    """An event in the log; `hash` is the SHA-256 of the canonical JSON of all other fields."""

    name: str
    sequence: int
    previous: str
    time: str
    actor: str
    action: str
    subject: str
    details: dict[str, Any]
    hash: str


class OvertakenError(RecordError):
    """Another event was appended first, so the decision was made without knowing it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        super().__init__(
            f"event {entry.sequence} came first: {entry.action} of {entry.subject} by {entry.actor}, "
            f"{entry.details.get('reason', '')!r}; look again, then decide again"
        )


class AuditLog:
    """The events of all models in one bucket.

    Args:
        bucket: name of the object-locked bucket; the standard AWS variables set endpoint and credentials.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._place = f"audit log s3://{bucket}"
        self._client = s3_client()
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
        """Verify the chain of the event's model, and append the event.

        Args:
            event: what was done, or is about to be.
            after: number of events that the actor has seen; more events are an error.

        Raises:
            RecordError: the chain is broken, the bucket has no object lock, or another event came first.
            StorageError: S3 refuses or does not answer, as in `read`.
        """
        lock = self._lock()
        for _ in range(ATTEMPTS):
            entries = self.read(event.name)
            if after is not None and len(entries) > after:
                raise OvertakenError(entries[after])
            entry = _next_entry(event, entries[-1] if entries else None)
            if self._put(entry, lock):
                return entry
        raise RecordError(f"s3://{self.bucket}/events/{event.name}: lost the race {ATTEMPTS} times; try again")

    def read(self, name: str) -> list[Entry]:
        """Return the verified events of the model `name`, oldest first; empty if there are none.

        Raises:
            RecordError: an entry was changed, replaced, deleted or moved; the message names it.
        """
        objects = self._objects(f"events/{_checked(name)}/")
        entries: list[Entry] = []
        for number, (key, version) in enumerate(objects, start=1):
            if key != _key(name, number):
                raise self._broken(_key(name, number), f"missing; the next one found is {key}")
            body = self._get(key, version)
            entries.append(self._verified(key, body, entries[-1] if entries else None))
        return entries

    def names(self) -> list[str]:
        """Return the names of models with events."""
        query = {"Bucket": self.bucket, "Prefix": "events/", "Delimiter": "/"}
        with s3_errors(self._place):
            pages = self._client.get_paginator("list_object_versions").paginate(**query)
            return [p["Prefix"].split("/")[1] for page in pages for p in page.get("CommonPrefixes", [])]

    def _verified(self, key: str, body: bytes, before: Entry | None) -> Entry:
        try:
            entry = Entry(**json.loads(body))
        except (ValueError, TypeError):
            raise self._broken(key, "not an audit entry") from None
        if entry.hash != _hash(entry):
            raise self._broken(key, f"its content no longer matches its hash {entry.hash[:12]}")
        if entry.previous != (before.hash if before else GENESIS):
            raise self._broken(key, "does not continue the entry before it")
        if _key(entry.name, entry.sequence) != key:
            raise self._broken(key, f"says that it is entry {entry.sequence} of {entry.name}")
        return entry

    def _broken(self, key: str, what: str) -> RecordError:
        return RecordError(f"audit log broken at s3://{self.bucket}/{key}: {what}")

    def _objects(self, prefix: str) -> list[tuple[str, str]]:
        """Return (key, version id) of every object, in order; raise on a second version or a delete marker."""
        found: dict[str, str] = {}
        with s3_errors(self._place):
            for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=prefix):
                for marker in page.get("DeleteMarkers", []):
                    raise self._broken(marker["Key"], f"deleted on {marker['LastModified']:%Y-%m-%d %H:%M:%S}")
                for item in page.get("Versions", []):
                    if item["Key"] in found:
                        raise self._broken(item["Key"], "overwritten: it has more than one version")
                    found[item["Key"]] = item["VersionId"]
        return sorted(found.items())

    def _get(self, key: str, version: str) -> bytes:
        with s3_errors(self._place):
            return self._client.get_object(Bucket=self.bucket, Key=key, VersionId=version)["Body"].read()

    def _put(self, entry: Entry, lock: Mapping[str, Any]) -> bool:
        """Write the object unless the key exists; return whether it holds these bytes, also after a resent request."""
        key, body = _key(entry.name, entry.sequence), _canonical(dataclasses.asdict(entry))
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


def _next_entry(event: Event, before: Entry | None) -> Entry:
    values = {
        **dataclasses.asdict(event),
        "details": dict(event.details),
        "sequence": before.sequence + 1 if before else 1,
        "previous": before.hash if before else GENESIS,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    entry = Entry(**values, hash="")
    return dataclasses.replace(entry, hash=_hash(entry))


def _hash(entry: Entry) -> str:
    values = dataclasses.asdict(entry)
    del values["hash"]
    return hashlib.sha256(_canonical(values)).hexdigest()


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _checked(name: str) -> str:
    if name != PLATFORM and not MODEL_NAME.fullmatch(name):
        raise RecordError(f"{name!r} is not a model name: letters, digits, dot, dash and underscore are allowed")
    return name


def _key(name: str, sequence: int) -> str:
    return f"events/{_checked(name)}/{sequence:08d}.json"
