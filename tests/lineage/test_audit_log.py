"""The audit log on a real object-locked bucket: order, races, and every kind of tampering."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.exceptions import ClientError

from components.core.storage import StorageError
from components.lineage.audit_log import GENESIS, AuditLog, Event
from components.lineage.lock_file import RecordError

pytestmark = pytest.mark.stack


@pytest.fixture
def log(storage) -> AuditLog:
    return AuditLog.from_environment()


@pytest.fixture
def name() -> str:
    return f"audit-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def three(log: AuditLog, name: str) -> list:
    return [log.append(Event(name, "promote", f"{name}/{i}", "rita", {"reason": f"Grund {i}: gült"})) for i in range(3)]


def key(name: str, number: int) -> str:
    return f"events/{name}/{number:08d}.json"


def test_chain(three, log: AuditLog, name: str):
    assert log.read(name) == three
    assert [e.sequence for e in three] == [1, 2, 3]
    assert [e.previous for e in three] == [GENESIS, three[0].hash, three[1].hash]
    values = dataclasses.asdict(three[1])
    stated = values.pop("hash")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated == hashlib.sha256(text.encode()).hexdigest()


def test_empty(log: AuditLog, name: str):
    assert log.read(name) == []


@pytest.mark.parametrize("days", [None, 1])
def test_events_cannot_be_deleted(log: AuditLog, name: str, days: int | None):
    """By the bucket owner's default retention where there is one, else for ten years."""
    client, bucket = boto3.client("s3"), f"{log.bucket}-{name}"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    if days:
        rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": days}}
        setting = {"ObjectLockEnabled": "Enabled", "Rule": rule}
        client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=setting)
    AuditLog(bucket).append(Event(name, "promote", f"{name}/1", "rita"))
    head = client.head_object(Bucket=bucket, Key=key(name, 1))
    assert head["ObjectLockMode"] == ("COMPLIANCE" if days else "GOVERNANCE")
    left = head["ObjectLockRetainUntilDate"] - datetime.datetime.now(datetime.UTC)
    assert round(left / datetime.timedelta(days=1)) == (days or 3653)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.delete_object(Bucket=bucket, Key=key(name, 1), VersionId=head["VersionId"])


def test_race_gives_each_writer_its_own_number(log: AuditLog, name: str):
    def write(number: int) -> int:
        return AuditLog(log.bucket).append(Event(name, "promote", f"{name}/1", str(number))).sequence

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(write, range(9))) == list(range(1, 10))
    assert sorted(e.actor for e in log.read(name)) == [str(i) for i in range(9)]


def test_overwritten_entry_is_named(three, log: AuditLog, name: str):
    changed = dataclasses.asdict(three[1]) | {"actor": "mallory"}
    boto3.client("s3").put_object(Bucket=log.bucket, Key=key(name, 2), Body=json.dumps(changed))
    with pytest.raises(RecordError, match=rf"{key(name, 2)}: overwritten") as error:
        log.read(name)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(RecordError, match="overwritten"):
        log.append(Event(name, "promote", f"{name}/4", "rita"))


def test_deleted_entry_is_named(three, log: AuditLog, name: str):
    boto3.client("s3").delete_object(Bucket=log.bucket, Key=key(name, 3))
    with pytest.raises(RecordError, match=rf"{key(name, 3)}: deleted on 20"):
        log.read(name)


def forge(log: AuditLog, model: str, changes: dict) -> None:
    """Write a fourth entry straight to S3, with its own hash right: only the chain can tell."""
    values = {"name": model, "sequence": 4, "previous": GENESIS, "time": "2026-01-01T00:00:00+00:00"}
    values |= {"actor": "mallory", "action": "promote", "subject": f"{model}/9", "details": {}, **changes}
    if "hash" not in values:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        values["hash"] = hashlib.sha256(text.encode()).hexdigest()
    boto3.client("s3").put_object(
        Bucket=log.bucket, Key=key(model, changes.get("sequence", 4)), Body=json.dumps(values)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash": "0" * 64}, "no longer matches its hash"),
        ({"previous": "1" * 64}, "does not continue the entry before it"),
        ({"sequence": 6}, "00000004.json: missing"),
        ({"name": "another"}, "says that it is entry 4 of another"),
        ({"extra": 1}, "not an audit entry"),
    ],
)
def test_forged_entry_is_named(three, log: AuditLog, name: str, changes: dict, message: str):
    forge(log, name, {"previous": three[-1].hash} | changes)
    with pytest.raises(RecordError, match=message):
        log.read(name)


def test_one_line_for_each_refusal(log: AuditLog, name: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RecordError, match="has no object lock"):
        AuditLog(os.environ["PEDIGREE_DATA_BUCKET"]).append(Event(name, "promote", "x/1", "rita"))
    with pytest.raises(StorageError, match="audit log s3://no-such-bucket: no such bucket"):
        AuditLog("no-such-bucket").read(name)
    with pytest.raises(RecordError, match="is not a model name"):
        log.read("../other")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="does not answer"):
        AuditLog(log.bucket).read(name)
    monkeypatch.delenv("PEDIGREE_AUDIT_BUCKET")
    with pytest.raises(RecordError, match="PEDIGREE_AUDIT_BUCKET is not set"):
        AuditLog.from_environment()
