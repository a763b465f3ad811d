"""The record of a run in git: anchored, and pushed to the checkout's remote."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from components.core.git import git, try_git
from components.lineage.anchors import read_anchors, set_anchor
from flows.git import push_runs
from flows.workspace import close_branch
from tests.flows.repository import IDENTITY, git_lines

RUN = "20261130-040000-abcd"
logger = logging.getLogger("flows.records")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one finished run, whose branch is checked out."""
    root = tmp_path / "checkout"
    root.mkdir()
    git_lines(root, "init", "-q", "-b", "main")
    commit(root, "start")
    git_lines(root, "checkout", "-q", "-b", f"runs/{RUN}")
    commit(root, "adapt: ran for 1 s")
    close_branch(root, "Run finished")
    return root


def commit(root: Path, subject: str) -> str:
    git_lines(root, *IDENTITY, "commit", "-q", "--allow-empty", "-m", subject)
    return git(root, "rev-parse", "HEAD")


def bare(folder: Path) -> Path:
    git_lines(folder, "init", "-q", "--bare", "remote.git")
    return folder / "remote.git"


def test_an_anchor_outlives_the_branch_and_gc(checkout: Path):
    end = git(checkout, "rev-parse", "HEAD")
    (anchor,) = read_anchors(checkout, RUN)
    assert (anchor.run, anchor.commit, anchor.name) == (RUN, end, f"anchors/{RUN}/{end[:12]}")
    assert git(checkout, "cat-file", "-t", anchor.id) == "tag"
    assert set_anchor(checkout, RUN, end) == anchor.id  # and is made once
    git(checkout, "checkout", "-q", "main")
    git(checkout, "branch", "-D", f"runs/{RUN}")
    git(checkout, "reflog", "expire", "--expire=now", "--all")
    git(checkout, "gc", "-q", "--prune=now")
    assert git(checkout, "show", "-s", "--format=%s", end) == "Run finished"


def test_an_auditors_clone_holds_every_run(checkout: Path, caplog: pytest.LogCaptureFixture):
    git(checkout, "remote", "add", "origin", str(bare(checkout.parent)))
    assert push_runs(checkout, logger)
    clone = checkout.parent / "clone"
    git_lines(checkout.parent, "clone", "-q", "-b", f"runs/{RUN}", "remote.git", "clone")
    assert git(clone, "rev-parse", f"origin/runs/{RUN}") == git(checkout, "rev-parse", f"runs/{RUN}")
    assert read_anchors(clone) == read_anchors(checkout)
    # A branch that was rewritten later does not replace what the remote has, and that is told; other runs arrive.
    git(checkout, "branch", "runs/20261130-050000-abcd", "main")
    git_lines(checkout, *IDENTITY, "commit", "-q", "--amend", "--allow-empty", "-m", "Run finished: other")
    assert not push_runs(checkout, logger)
    assert "git remote origin lacks runs (" in caplog.text
    assert "non-fast-forward" in caplog.text
    git(clone, "fetch", "-q")
    assert git(clone, "log", "-1", "--format=%s", f"origin/runs/{RUN}") == "Run finished"
    assert try_git(clone, "rev-parse", "--verify", "origin/runs/20261130-050000-abcd")


def test_a_run_without_a_remote_or_with_one_that_is_away_says_so(checkout: Path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert not push_runs(checkout, logger)
    assert f"the record of the runs is only in {checkout}, which has no git remote" in caplog.text
    monkeypatch.setattr("flows.git.TRY_AGAIN_SECONDS", (0.0,))
    git(checkout, "remote", "add", "team", "http://127.0.0.1:9/team.git")
    assert not push_runs(checkout, logger)
    assert "git remote team lacks runs" in caplog.text
    assert "the next run pushes them again, or `git push team 'refs/heads/runs/*:refs/heads/runs/*'" in caplog.text
    git(checkout, "remote", "set-url", "team", str(bare(checkout.parent)))
    assert push_runs(checkout, logger)
