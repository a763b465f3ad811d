"""What goes into a run's commit, from checkouts as people have them: strays, secrets, hooks, another owner."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.git import git
from components.lineage.ledger import Ledger
from flows import snapshot as snapshot_module
from flows.git import WorkspaceError, head_commit
from flows.snapshot import looks_secret, snapshot
from flows.workspace import Workspace
from tests.flows.repository import git_lines

PARAMS = "seed: 7\n"


class _Lines(logging.Handler):
    """What is logged, by a handler of our own: in one run beside other tests pytest's saw nothing, cause unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What our flows log."""
    handler = _Lines()
    logging.getLogger("flows").addHandler(handler)
    yield handler.lines
    logging.getLogger("flows").removeHandler(handler)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with code, no DVC."""
    root = tmp_path / "main"
    put(root, "flows/code.py", "dvc.yaml", "params.yaml")
    (root / ".gitignore").write_text("/.pedigree\n/reports/*.html\n__pycache__/\n")
    for command in (
        ["init", "-q", "-b", "main"], ["config", "user.name", "Test"], ["config", "user.email", "test@localhost"],
        ["add", "-A"], ["commit", "-q", "-m", "start"],
    ):  # fmt: skip
        git_lines(root, *command)
    return root


def put(root: Path, *names: str, text: str = "as it is\n") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def taken(root: Path) -> set[str]:
    """The files of a run that starts now; the checkout's index and files stay as they are."""
    before = git_lines(root, "status", "--porcelain"), git_lines(root, "ls-files", "--stage")
    commit = snapshot(root, PARAMS, ["photos/ab"], "Run")
    assert (git_lines(root, "status", "--porcelain"), git_lines(root, "ls-files", "--stage")) == before
    return set(git_lines(root, "-c", "core.quotePath=false", "ls-tree", "-r", "--name-only", commit))


def test_only_code_and_configuration_go_in_and_the_rest_is_named(root, told):
    put(
        root, "components/new/step.py", "flows/ü b.py", "prefect.yaml", "data/pool/photos/ab.dvc", "tests/__pycache__/x"
    )
    put(root, *(f"photos/{k}.jpg" for k in range(1234)), "notes.txt", "IMG_1.jpg", "data/pool/photos/stray.txt")
    (root / "photos/0.jpg").write_bytes(bytes(3 * 2**20))
    committed = {"flows/code.py", "dvc.yaml", "params.yaml", ".gitignore"}
    new = {"components/new/step.py", "flows/ü b.py", "prefect.yaml", "data/pool/photos/ab.dvc"}
    assert taken(root) == committed | new
    assert [line.partition(": ")[2] for line in told] == [
        "2 file(s), such as IMG_1.jpg",
        "data/pool/photos/stray.txt",
        "1,234 file(s), 3 MiB, such as photos/0.jpg",
    ]


def test_tracked_files_go_in_as_they_are(root, told):
    put(root, "photo.jpg", "moved.txt")
    git(root, "add", "photo.jpg", "moved.txt")  # a person's own choice, wherever it lies
    put(root, "photo.jpg", text="edited after it was added\n")
    (root / "moved.txt").unlink()
    put(root, "moved.txt/stray")
    (root / "dvc.yaml").unlink()
    assert taken(root) == {"flows/code.py", "params.yaml", ".gitignore", "photo.jpg"}
    commit = snapshot(root, PARAMS, [], "Run")
    assert git(root, "show", f"{commit}:photo.jpg") == "edited after it was added"
    assert told[0].endswith(": moved.txt/stray")


def test_secrets_stay_out_of_a_run(root, told):
    put(root, "flows/.env", "flows/server.PEM", "infra/id_rsa", "infra/credentials.json", "flows/credentials.py")
    put(root, "infra/kept.key")
    git(root, "add", "infra/kept.key")
    git(root, "commit", "-q", "-m", "a key that is tracked")
    put(root, "infra/kept.key", text="edited\n")
    put(root, "infra/staged.key")
    git(root, "add", "infra/staged.key")
    assert taken(root) - {"dvc.yaml", "params.yaml", ".gitignore", "flows/code.py"} == {
        "flows/credentials.py",
        "infra/kept.key",
    }
    assert git(root, "show", f"{snapshot(root, PARAMS, [], 'Run')}:infra/kept.key") == "as it is"
    text = "\n".join(told)
    assert "by names like those of secrets: 4 file(s), such as flows/.env" in text
    for name in ("kept", "staged"):
        assert f"infra/{name}.key looks like a secret: the run has its committed version, if any" in text
    objects = git_lines(root, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)")
    assert "edited" not in [git(root, "cat-file", "-p", name) for name in objects]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("flows/.env", True), (".env.production", True), (".env.example", False), ("env.py", False), ("a/.netrc", True),
        ("credentials", True), ("credentials-2.json", True), ("credentials.py", False), ("credentialing.yaml", False),
        ("id_rsa", True), ("id_rsa.bak", True), ("id_ed25519.pub", False), ("keys.yaml", False), ("x.p12", True),
        ("secrets.yaml", True), ("secretary.yaml", False), ("test_secrets.py", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name, secret):
    assert looks_secret(name) is secret


def test_a_repository_within_is_left_out(root, told):
    for name in ("flows/inner", "other"):
        git_lines(root, "init", "-q", name)
        put(root, f"{name}/x.py")
    git_lines(root / "other", "add", "x.py")
    git_lines(root / "other", "-c", "user.name=a", "-c", "user.email=b@c", "commit", "-q", "-m", "x")
    assert taken(root) == {"flows/code.py", "dvc.yaml", "params.yaml", ".gitignore"}
    assert set(told) == {
        "left out of the run: flows/inner/ is a git repository of its own",
        "left out of the run: other/ is a git repository of its own",
    }


def test_files_that_are_too_large_are_refused(root, monkeypatch):
    (root / "flows/weights.bin").write_bytes(bytes(6 * 2**20))
    with pytest.raises(WorkspaceError, match=r"^flows/weights\.bin \(6\.0 MiB; .* up to 5 MiB each.*commit it to git"):
        snapshot(root, PARAMS, [], "Run")
    git(root, "add", "flows/weights.bin")  # then it is a person's own decision
    assert "flows/weights.bin" in taken(root)
    monkeypatch.setattr(snapshot_module, "MAX_SUM_MIB", 1)
    for name in ("a", "b"):
        (root / f"flows/{name}.bin").write_bytes(bytes(2**20))
    with pytest.raises(WorkspaceError, match=r"all 2 untracked: 2\.0 MiB\): .* 1 MiB together"):
        snapshot(root, PARAMS, [], "Run")


class NoStages(Ledger):
    """The ledger of a folder in which DVC has nothing to say."""

    def stages(self):
        return []


def test_a_stage_leaves_its_record_and_its_outputs_and_no_strays(root, told):
    put(root, "dvc.lock", text="stages: {a: {cmd: x, outs: [{path: reports/a.json}, {path: reports/b}]}}\n")
    put(root, "reports/a.json", "reports/b/c/d.json", "reports/.gitignore", "reports/other.json", "core.123")
    put(root, "reports/page.html", "flows/code.py", text="changed by a stage\n")
    work = Workspace(root, "1", NoStages(root))
    head = git(root, "rev-parse", "HEAD")
    commit = work.commit("a: ran")
    changed = git_lines(root, "diff", "--name-only", head, commit)
    assert changed == ["dvc.lock", "reports/.gitignore", "reports/a.json", "reports/b/c/d.json"]
    (root / "reports/a.json").unlink()
    assert work.commit("a: ran again") != commit
    assert work.commit("nothing new") == git(root, "rev-parse", "HEAD")
    assert told == [
        f"not committed to runs/1, no stage's output: {name}"
        for name in ("core.123", "flows/code.py", "reports/other.json")
    ]


HOOKS = ("post-checkout", "pre-commit", "prepare-commit-msg", "commit-msg", "reference-transaction", "post-commit")


@pytest.mark.parametrize("where", [".git/hooks", "hooks"])
def test_neither_hooks_nor_signatures_are_wanted(root, where):
    git(root, "config", "core.hooksPath", os.fspath(root / where))
    git(root, "config", "commit.gpgSign", "true")
    git(root, "config", "gpg.program", "false")
    for name in HOOKS:
        put(root, f"{where}/{name}", text="#!/bin/sh\nexit 1\n")
        (root / where / name).chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError):
        git_lines(root, "branch", "refused")
    commit = snapshot(root, PARAMS, [], "Run")
    folder = root / ".pedigree/runs/1"
    git(root, "worktree", "add", "--quiet", "-b", "runs/1", os.fspath(folder), commit)
    put(folder, "dvc.lock", text="{}\n")
    assert Workspace(folder, "1", NoStages(folder)).commit("a: ran") != commit


def test_a_checkout_of_another_user(root, monkeypatch, tmp_path):
    if os.getuid():
        pytest.skip("only root can give a folder away")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    os.chown(root, 12345, 12345)
    os.chown(root / ".git", 12345, 12345)
    with pytest.raises(WorkspaceError) as caught:
        head_commit(root)
    assert "dubious ownership" in str(caught.value)
    assert f"git config --global --add safe.directory {root}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "git init" not in str(caught.value)


def test_a_folder_of_a_larger_repository_is_refused(root):
    with pytest.raises(WorkspaceError, match=r"flows is the folder flows/ of a git repository"):
        head_commit(root / "flows")


def test_a_submodule_is_refused(root, tmp_path):
    above = tmp_path / "above"
    git_lines(tmp_path, "init", "-q", os.fspath(above))
    git_lines(above, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", os.fspath(root), "inner")
    with pytest.raises(WorkspaceError, match=r"inner is a submodule of .*above, and DVC cannot work in one: clone"):
        head_commit(above / "inner")
