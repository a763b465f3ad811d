"""Verifying the whole audit log: every kind of tampering is named, also in a file that was taken away."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import subprocess
import uuid
from pathlib import Path

import boto3
import pytest

from components.core.audit_keys import AUDIT_PUBLIC_KEYS
from components.core.errors import InputError
from components.lineage.audit_anchors import TRAILER, Anchor, anchor_text, git_anchors
from components.lineage.audit_chain import Head
from components.lineage.audit_heads import Heads
from components.lineage.audit_log import AuditLog, Event
from components.lineage.audit_verify import export_log, verify_file, verify_log
from infra.local.site import make_signing_key
from tests.flows.repository import IDENTITY, git_lines

pytestmark = pytest.mark.stack
LOCKED = {
    "ObjectLockMode": "GOVERNANCE",
    "ObjectLockRetainUntilDate": datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1),
}


@pytest.fixture
def log(storage) -> AuditLog:
    """A bucket of its own with two chains."""
    bucket = f"audit-{uuid.uuid4().hex[:10]}"
    boto3.client("s3").create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    made = AuditLog(bucket, Heads(bucket, None))
    for number in range(4):
        made.append(Event("pedigree", "promote", f"pedigree/{number}", "rita", {"reason": "gült"}))
    made.append(Event("_platform", "ingest", "photos", "rita"))
    return made


def key(number: int) -> str:
    return f"events/pedigree/{number:08d}.json"


def test_an_untouched_log_holds_and_says_how_long_it_is_locked(log: AuditLog):
    report = verify_log(log, [])
    assert report.faults == []
    assert [(one.chain, len(one.entries), one.unsigned) for one in report.chains] == [
        ("_platform", 1, 0), ("pedigree", 4, 0),
    ]  # fmt: skip
    left = report.chains[0].until - datetime.datetime.now(datetime.UTC)
    assert round(left / datetime.timedelta(days=1)) == 3653
    assert report.as_dict()["holds"]


def test_every_kind_of_tampering_is_named(log: AuditLog):
    s3, entries = boto3.client("s3"), log.read("pedigree")
    s3.put_object(Bucket=log.bucket, Key=key(1), Body=b"{}", **LOCKED)
    s3.delete_object(Bucket=log.bucket, Key=key(2))
    version = s3.head_object(Bucket=log.bucket, Key=key(3))["VersionId"]
    s3.delete_object(Bucket=log.bucket, Key=key(3), VersionId=version, BypassGovernanceRetention=True)
    s3.put_object(Bucket=log.bucket, Key=key(3), Body=dataclasses.replace(entries[2], actor="mallory").body)
    s3.put_object(Bucket=log.bucket, Key=key(6), Body=entries[3].body, **LOCKED)
    faults = "\n".join(verify_log(log, []).faults)
    for told in (
        f"{key(1)}: overwritten", f"{key(2)}: deleted on 20", f"{key(3)}: its content no longer matches its hash",
        f"{key(3)}: not locked, so it can be deleted", f"{key(5)}: missing; the next one found is {key(6)}",
        f"{key(6)}: says that it is entry 4", f"{key(6)}: does not continue",
    ):  # fmt: skip
        assert told in faults
    assert len(faults.splitlines()) == 7


def test_an_end_that_was_cut_off_is_seen_by_what_git_has(log: AuditLog, tmp_path: Path):
    entries = log.read("pedigree")
    anchors = [f"{TRAILER}: {anchor_text('pedigree', Head(e.sequence, e.hash))}" for e in entries[1:]]
    git_lines(tmp_path, "init", "-q", "-b", "main")
    for number, anchor in enumerate(anchors):
        git_lines(tmp_path, *IDENTITY, "commit", "-q", "--allow-empty", "-m", f"Run finished {number}", "-m", anchor)
    found = git_anchors(tmp_path)
    assert sorted(anchor.sequence for anchor in found) == [2, 3, 4]
    assert git_anchors(tmp_path / "none") == []
    assert verify_log(log, found).faults == []
    s3, version = boto3.client("s3"), boto3.client("s3").head_object(Bucket=log.bucket, Key=key(4))["VersionId"]
    s3.delete_object(Bucket=log.bucket, Key=key(4), VersionId=version, BypassGovernanceRetention=True)
    (fault,) = verify_log(log, found).faults
    commit = git_lines(tmp_path, "rev-parse", "HEAD")[0][:12]
    assert fault == f"{key(4)}: missing: commit {commit} anchors it, but the chain ends with event 3"
    other = Anchor("MLflow's experiment x", "pedigree", 3, "0" * 64)
    gone = Anchor("MLflow's registered model x", "x", 1, "0" * 64)
    told = verify_log(log, [other, gone]).faults
    assert told == [
        f"{key(3)}: replaced: MLflow's experiment x anchors the hash 000000000000",
        "events/x/00000001.json: missing: MLflow's registered model x anchors it, but the chain ends with event 0",
    ]


def test_a_file_is_verified_without_s3(log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "audit.jsonl"
    assert export_log(log, file) == 5
    for variable in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(variable)
    assert (verify_file(file).faults, verify_file(file).notes) == ([], [])
    head, *rows = file.read_text().splitlines()
    pem = json.loads(head)["keys"][0]["pem"]
    entry = json.loads(json.loads(rows[1])["body"])
    (tmp_path / "key.pem").write_text(pem)
    (tmp_path / "signature").write_bytes(base64.b64decode(entry["signature"]))
    (tmp_path / "hash").write_text(entry["hash"])
    command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "hash"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).stdout == b"Verified OK\n"

    file.write_text("\n".join([head, *rows]).replace("rita", "mallory"))
    assert len(verify_file(file).faults) == 5
    file.write_text("\n".join([head, *rows[:-1]]))
    assert verify_file(file).faults == [f"{file} has 4 of 5 events: it is cut off"]
    file.write_text("\n".join([head, *rows]))
    monkeypatch.delenv(AUDIT_PUBLIC_KEYS)
    assert verify_file(file).faults == []
    assert "so those in the file were used; compare their ids: reviewer " in verify_file(file).notes[0]
    make_signing_key(tmp_path / "own.pem", tmp_path / "other.pem")
    monkeypatch.setenv(AUDIT_PUBLIC_KEYS, str(tmp_path / "other.pem"))
    assert "signed as rita with the unknown key" in verify_file(file).faults[0]
    for text in ("", "{", head.replace("pedigree-audit/1", "x"), f"{head}\n{{}}"):
        file.write_text(text)
        with pytest.raises(InputError, match="not a file that `pedigree audit export` wrote"):
            verify_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        verify_file(tmp_path)
