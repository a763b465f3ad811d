"""Events of runs in the audit log, and what a run's closing commit says of the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from components.core.storage import StorageError
from components.data.expectations import FAILED, Check, write_checks
from components.lineage.audit_anchors import git_anchors
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from flows import run_events
from flows.workspace import close_branch
from tests.flows.repository import IDENTITY, git_lines

pytestmark = pytest.mark.stack


def test_the_closing_commit_anchors_the_log(storage, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    root = tmp_path / "main"
    root.mkdir()
    (root / "params.yaml").write_text("name: closed\n")
    checks = [("curated set", Check("ids_unique", "no image_id is there twice", 3, 0))]
    write_checks(root / "reports/curate/validation.json", checks)
    curated = {"path": "data/curated", "md5": f"{'a' * 32}.dir"}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"curate": {"cmd": "true", "outs": [curated]}}}))
    git_lines(root, "init", "-q", "-b", "main")
    git_lines(root, *IDENTITY, "commit", "-q", "--allow-empty", "-m", "last: ran for 1 s")
    head = git_lines(root, "rev-parse", "HEAD")[0]
    log = AuditLog.from_environment()
    log.append(Event("closed-candidates", "register", "closed-candidates/1", "rita"))
    commit = close_branch(root, "Run finished")
    assert close_branch(root, "Run failed: x") == commit
    gate, event = log.read(PLATFORM)[-2:]
    assert (gate.action, gate.subject) == ("gate", "main")
    assert gate.details == {"stage": "curate", "passed": True, "checks": 1, "data": curated["md5"]}
    assert (event.action, event.subject) == ("run-ended", "main")
    assert event.details == {"model": "closed", "commit": head, "how": "Run finished"}
    anchors = {anchor.chain: (anchor.sequence, anchor.hash) for anchor in git_anchors(root)}
    assert anchors.keys() == {PLATFORM, "closed-candidates"}
    assert anchors[PLATFORM] == (event.sequence, event.hash)
    assert git_lines(root, "show", "-s", "--format=%s", "HEAD") == ["Run finished"]

    (root / "reports/curate/validation.json").unlink()
    git_lines(root, *IDENTITY, "commit", "-q", "--allow-empty", "-m", "last: ran for 1 s")
    refused = f"Run failed: curated set: 1 {FAILED}: ids_unique"
    close_branch(root, refused)
    gate = log.read(PLATFORM)[-2]
    assert gate.details == {"stage": "curate", "passed": False, "reason": refused}

    git_lines(root, *IDENTITY, "commit", "-q", "--allow-empty", "-m", "last: ran for 1 s")
    monkeypatch.setenv("PEDIGREE_AUDIT_BUCKET", "no-such-bucket")
    with pytest.raises(StorageError, match="audit log s3://no-such-bucket: no such bucket"):
        run_events.check_log()
    with caplog.at_level(logging.WARNING):
        close_branch(root, "Run failed: S3 is away")
    assert "the end of run main is not in the audit log: audit log s3://no-such-bucket: no such bucket" in caplog.text
    assert git_lines(root, "show", "-s", "--format=%B", "HEAD") == ["Run failed: S3 is away", ""]
    monkeypatch.delenv("PEDIGREE_AUDIT_BUCKET")
    run_events.check_log()
