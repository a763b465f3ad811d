"""Git as everything here calls it: what is returned, and how it fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from components.core.git import GitError, file_at, git, try_git

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    (root / "crlf").write_bytes(b"one\r\ntwo \xff\n\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "start")
    return root


def test_a_files_bytes_are_those_of_the_commit(root):
    (root / "crlf").write_bytes(b"edited")
    assert file_at(root, "HEAD", "crlf") == b"one\r\ntwo \xff\n\n"
    assert file_at(root, "HEAD", "none") is None
    assert file_at(root, "none", "crlf") is None


def test_names_that_are_no_text_come_and_go_as_they_are(root):
    name = os.fsdecode(b"odd \xff")
    (root / name).touch()
    found = git(root, "ls-files", "-z", "--others").rstrip("\0")
    assert found == name
    git(root, "update-index", "--add", "-z", "--stdin", given=f"{found}\0")
    assert git(root, "diff-index", "--cached", "--name-only", "-z", "HEAD") == f"{name}\0"


def test_a_refusal_is_one_line_or_none(root, tmp_path):
    with pytest.raises(GitError, match=rf"^git worktree in {root}: fatal: .*nowhere") as caught:
        git(root, "worktree", "add", str(tmp_path / "x"), "nowhere")
    assert "\n" not in str(caught.value)
    assert try_git(root, "rev-parse", "--verify", "nowhere") is None
    assert try_git(tmp_path, "rev-parse", "HEAD") is None


def test_git_that_is_missing_is_an_error_for_all(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    for call in (lambda: git(root, "status"), lambda: try_git(root, "status"), lambda: file_at(root, "HEAD", "crlf")):
        with pytest.raises(GitError, match=r"^git is not installed, and a run is a commit$"):
            call()


def test_no_other_module_runs_git():
    files = [path for top in ("flows", "components", "infra") for path in (PROJECT / top).rglob("*.py")]
    command = re.compile(r"""[\[(]\s*["']git["'],\s*["'-]""")
    found = [str(path.relative_to(PROJECT)) for path in files if command.search(path.read_text())]
    assert found == ["components/core/git.py"]
