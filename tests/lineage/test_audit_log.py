"""The audit log on a real object-locked bucket: order, races, and every kind of tampering."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from components.core.audit_keys import AUDIT_KEY, AUDIT_PUBLIC_KEYS, AuditKeyError, own_signer, trusted_keys
from components.core.errors import TRY_AGAIN
from components.core.storage import StorageError
from components.core.user import TRAINER
from components.lineage import audit_log
from components.lineage.audit_chain import Head, hash_of, next_entry
from components.lineage.audit_heads import Heads
from components.lineage.audit_log import GENESIS, AuditLog, Entry, Event, open_log
from components.lineage.lock_file import RecordError
from infra.local.site import Site, make_signing_key

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
    stated, signature = values.pop("hash"), values.pop("signature")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated == hashlib.sha256(text.encode()).hexdigest()
    key = trusted_keys()[three[1].key]
    assert key.name == "reviewer"  # the admin, whom these tests work as, is one
    assert key.verifies(stated, signature)
    assert not key.verifies(GENESIS, signature)


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
        return AuditLog(log.bucket, Heads(log.bucket, None)).append(Event(name, "promote", "x", str(number))).sequence

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(write, range(9))) == list(range(1, 10))
    assert sorted(e.actor for e in log.read(name)) == [str(i) for i in range(9)]


def test_overwritten_entry_is_named(three, log: AuditLog, name: str):
    changed = dataclasses.asdict(three[2]) | {"actor": "mallory"}
    boto3.client("s3").put_object(Bucket=log.bucket, Key=key(name, 3), Body=json.dumps(changed))
    with pytest.raises(RecordError, match=rf"{key(name, 3)}: overwritten") as error:
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
        ({"details": 1}, "not an audit entry"),
        ({"actor": "Rita <rita@example.org>"}, "not signed, but an entry before it is"),
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
    with pytest.raises(StorageError, match="does not answer") as error:
        AuditLog(log.bucket).read(name)
    assert error.value.exit_code == TRY_AGAIN
    monkeypatch.delenv("PEDIGREE_AUDIT_BUCKET")
    with pytest.raises(RecordError, match="PEDIGREE_AUDIT_BUCKET is not set"):
        AuditLog.from_environment()
    audit_log._warn_of_no_log.cache_clear()
    assert open_log() is None


def put(log: AuditLog, entry: Entry) -> None:
    boto3.client("s3").put_object(Bucket=log.bucket, Key=key(entry.name, entry.sequence), Body=entry.body)


def cut(log: AuditLog, name: str, number: int) -> None:
    """Delete an entry as the admin can: with governance bypass, so that no marker stays."""
    client, where = boto3.client("s3"), {"Bucket": log.bucket, "Key": key(name, number)}
    version = client.head_object(**where)["VersionId"]
    client.delete_object(**where, VersionId=version, BypassGovernanceRetention=True)


def test_forked_processes_do_not_read_each_others_answers(log: AuditLog, name: str):
    events = [log.append(Event(f"{name}-{number}", "promote", f"{name}/{number}", "ours")) for number in range(2)]
    context = multiprocessing.get_context("fork")

    def read(event: Entry) -> None:
        for _ in range(20):
            if AuditLog.from_environment().read(event.name) != [event]:
                os._exit(1)
        os._exit(0)

    both = [context.Process(target=read, args=(event,)) for event in events]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]


def test_an_event_signed_with_an_unknown_key_or_by_who_may_not_decide_is_named(
    three, log: AuditLog, name: str, storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    head = Head(3, three[-1].hash, signed=True)
    make_signing_key(tmp_path / "own.pem", tmp_path / "keys/mallory.pem")
    monkeypatch.setenv(AUDIT_KEY, str(tmp_path / "own.pem"))
    promotion = Event(name, "promote", f"{name}/9", "Rita <rita@example.org>")
    with pytest.raises(RecordError, match=r"event not written .* signed as Rita .* with the unknown key"):
        log.append(promotion)
    put(log, next_entry(promotion, head, own_signer()))
    with pytest.raises(RecordError, match=rf"{key(name, 4)}: signed as Rita .* with the unknown key"):
        log.read(name)
    cut(log, name, 4)
    monkeypatch.setenv(AUDIT_KEY, str(Site.load(storage.root).audit_key(TRAINER)))
    with pytest.raises(RecordError, match=r"event not written .* trainer's key, which may not decide"):
        log.append(promotion)
    mine = next_entry(dataclasses.replace(promotion, action="register"), head, own_signer())
    forged = dataclasses.replace(mine, actor="Rita")
    put(log, dataclasses.replace(forged, hash=hash_of(forged)))
    with pytest.raises(RecordError, match=rf"{key(name, 4)}: its signature is not that of the trainer's key"):
        log.read(name)
    cut(log, name, 4)
    log.append(dataclasses.replace(promotion, action="register"))
    monkeypatch.setenv(AUDIT_PUBLIC_KEYS, str(tmp_path / "keys"))
    with pytest.raises(RecordError, match="with the unknown key"):
        log.read(name)
    monkeypatch.delenv(AUDIT_PUBLIC_KEYS)
    with pytest.raises(AuditKeyError, match="PEDIGREE_AUDIT_PUBLIC_KEYS is not set"):
        log.read(name)


def test_events_of_before_signatures_are_read_and_none_follows_a_signed_one(
    log: AuditLog, name: str, monkeypatch: pytest.MonkeyPatch
):
    event = Event(name, "promote", f"{name}/1", "rita")
    with monkeypatch.context() as patched:
        patched.delenv(AUDIT_KEY)
        assert log.append(event).signature is None
    assert log.append(event).signature
    assert [entry.signature is None for entry in log.read(name)] == [True, False]
    monkeypatch.delenv(AUDIT_KEY)
    with pytest.raises(RecordError, match=r"PEDIGREE_AUDIT_KEY is not set, and the events of .* are signed"):
        log.append(event)


def test_an_append_reads_one_entry_however_long_the_chain(log: AuditLog, name: str, tmp_path: Path, monkeypatch):
    event, read = Event(name, "promote", f"{name}/1", "rita"), []
    fetch = AuditLog._fetch
    monkeypatch.setattr(AuditLog, "_fetch", lambda self, found: (read.append(found.key), fetch(self, found))[1])
    for number in range(1, 13):
        writer = AuditLog(log.bucket, Heads(log.bucket, tmp_path))
        assert writer.append(event, after=number - 1).sequence == number
    assert read == [key(name, number) for number in range(1, 12)]
    read.clear()
    for file in tmp_path.rglob("*.json"):
        file.write_text("{")  # as after a crash of the machine: one whole reading
    assert AuditLog(log.bucket, Heads(log.bucket, tmp_path)).append(event).sequence == 13
    assert sorted(read) == [key(name, number) for number in range(1, 13)]


def test_a_tail_that_was_cut_off_and_an_entry_that_was_replaced_are_named(three, log: AuditLog, name: str, tmp_path):
    def anew() -> AuditLog:
        return AuditLog(log.bucket, Heads(log.bucket, tmp_path))

    event = Event(name, "promote", f"{name}/4", "rita")
    anew().append(event)
    cut(log, name, 4)
    for attempt in (lambda: anew().read(name), lambda: anew().append(event)):
        with pytest.raises(RecordError, match=rf"{key(name, 4)}: missing: the end .* was cut off.*delete {tmp_path}"):
            attempt()
    put(log, next_entry(event, Head(3, three[-1].hash, signed=True), own_signer()))
    for attempt in (lambda: anew().read(name), lambda: anew().append(event)):
        with pytest.raises(RecordError, match=rf"{key(name, 4)}: replaced: another entry than before"):
            attempt()
    assert len(AuditLog(log.bucket, Heads(log.bucket, None)).read(name)) == 4  # nothing else can tell
    with pytest.raises(RecordError, match=rf"{key(name, 5)}: missing: .* cut off meanwhile"):
        AuditLog(log.bucket, Heads(log.bucket, None)).append(event, after=6)


WRITER = """
import sys
from components.lineage.audit_log import AuditLog, Event
log = AuditLog.from_environment()
while True:
    print(log.append(Event(sys.argv[1], "promote", "x", "killed", {"text": "x" * 2000})).hash, flush=True)
"""


def test_two_writers_one_of_them_killed_lose_nothing_and_leave_nothing_half(log: AuditLog, name: str, tmp_path: Path):
    (tmp_path / ".pedigree").mkdir()
    there = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", WRITER, name]
    writer = subprocess.Popen(command, cwd=tmp_path, env=there, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip()]
    told += [log.append(Event(name, "promote", "x", "rita")).hash for _ in range(8)]
    writer.kill()
    told += [line.strip() for line in writer.communicate()[0].splitlines()]
    assert len(list((tmp_path / ".pedigree/audit-heads").glob(f"*/{name}.json"))) == 1
    entries = AuditLog(log.bucket, Heads(log.bucket, None)).read(name)
    assert {line for line in told if len(line) == 64} <= {entry.hash for entry in entries}
    assert {entry.actor for entry in entries} == {"rita", "killed"}
    assert log.append(Event(name, "promote", "x", "rita")).sequence == len(entries) + 1
