"""A run's folder and its first commit, in real git repositories."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from components.core.git import git
from components.recipe import Recipe, load_recipe
from flows import workspace
from flows.git import WorkspaceError
from flows.workspace import (
    open_workspace,
    params_text,
    snapshot,
)
from tests.flows.repository import DVC, PROJECT, git_lines, make_repository

PARAMS = "seed: 7 # as given\n"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(PROJECT, "tiny-cpu")


def checkout_state(root: Path) -> tuple:
    """All that a run must leave alone: files, index, branch and what git says of them."""
    files = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and not {".git", ".pedigree"} & set(path.relative_to(root).parts)
    }
    said = [
        git_lines(root, *ask) for ask in (("status", "--porcelain"), ("ls-files", "--stage"), ("rev-parse", "HEAD"))
    ]
    return files, said, (root / ".git/HEAD").read_text()


def add_source(root: Path, name: str) -> str:
    folder = root / "data/pool" / name / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "image").write_text(name)
    subprocess.run([DVC, "add", "-q", str(folder)], cwd=root, check=True)
    return f"data/pool/{name}/0123456789ab.dvc"


def test_snapshot_has_edits_and_new_files_never_ignored_ones(tmp_path):
    root = make_repository(tmp_path)
    head = git(root, "rev-parse", "HEAD")
    (root / "dvc.yaml").write_text((root / "dvc.yaml").read_text() + "# edited\n")
    (root / "flows").mkdir()
    (root / "flows/new.py").write_text("new\n")
    (root / "staged.py").write_text("staged\n")
    git(root, "add", "staged.py")
    (root / "gone.txt").write_text("x")
    git(root, "add", "gone.txt")
    (root / "gone.txt").unlink()
    (root / "first").mkdir()
    (root / "first/x").write_text("an output, which .gitignore names")
    (root / ".pedigree").mkdir()
    (root / ".pedigree/credentials").write_text("secret")
    before = checkout_state(root)

    commit = snapshot(root, PARAMS, ["photos/ab12"], "Run 1")

    assert checkout_state(root) == before
    assert git(root, "show", f"{commit}:dvc.yaml").endswith("# edited")
    assert git(root, "show", f"{commit}:params.yaml") + "\n" == PARAMS
    files = git_lines(root, "ls-tree", "-r", "--name-only", commit)
    assert {"flows/new.py", "staged.py", "data/pool/photos/ab12.dvc"} <= set(files)
    assert not [name for name in files if name.startswith((".pedigree", "first", "gone.txt", "data/pool/photos/ab12/"))]
    assert git(root, "rev-parse", f"{commit}^") == head
    assert git(root, "show", "-s", "--format=%s", commit) == "Run 1"


def test_only_the_chosen_sources_are_in_the_commit(tmp_path):
    root = make_repository(tmp_path)
    other, evaluation = add_source(root, "other"), root / "data/evaluation/other/ff.dvc"
    evaluation.parent.mkdir(parents=True)
    evaluation.write_text("outs: []\n")
    commit = snapshot(root, PARAMS, ["photos/ab12"], "Run")
    files = git_lines(root, "ls-tree", "-r", "--name-only", commit, "data")
    assert files == ["data/pool/photos/ab12.dvc"]
    files = git_lines(
        root, "ls-tree", "-r", "--name-only", snapshot(root, PARAMS, ["other/ff", "other/0123456789ab"], "Run"), "data"
    )
    assert files == ["data/evaluation/other/ff.dvc", other]


def test_the_folder_of_a_run(tmp_path, recipe):
    root = make_repository(tmp_path)
    (root / "dvc.yaml").write_text("stages: {}\n")  # its own needs parameters that no recipe has
    before = checkout_state(root)
    with open_workspace(root, recipe, ["photos/ab12"]) as work:
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", work.run_id)
        assert work.root == root / ".pedigree/runs" / work.run_id
        assert git(work.root, "branch", "--show-current") == work.branch == f"runs/{work.run_id}"
        assert (work.root / ".pedigree").resolve() == root / ".pedigree"
        assert yaml.safe_load((work.root / "params.yaml").read_text())["name"] == recipe.name
        assert work.ledger.bring_data() == 1
        assert (work.root / "data/pool/photos/ab12/image").read_text() == "bytes"
        cache = subprocess.run([DVC, "cache", "dir"], cwd=work.root, check=True, capture_output=True, text=True)
        assert Path(cache.stdout.strip()) == root / ".dvc/cache"
        assert git(work.root, "status", "--porcelain") == ""
        (work.root / "dvc.lock").write_text("schema: '2.0'\n")
        commit = work.commit("first: ran for 1 s")
        assert work.commit("nothing new") == commit
    assert (work.root / "dvc.lock").exists()  # stays, to look into
    assert git_lines(root, "log", "--format=%s", work.branch)[:2] == ["first: ran for 1 s", f"Run {work.run_id}"]
    assert checkout_state(root) == before


def test_old_folders_go_and_their_branches_and_a_running_one_stay(tmp_path, recipe, monkeypatch):
    root = make_repository(tmp_path)
    numbers = iter(range(100))
    monkeypatch.setattr(workspace.secrets, "token_hex", lambda _: f"{next(numbers):04x}")
    made = []
    with open_workspace(root, recipe, ["photos/ab12"]) as running:
        for _ in range(workspace.KEPT_FOLDERS + 2):
            with open_workspace(root, recipe, ["photos/ab12"]) as work:
                made.append(work)
        assert running.root.exists()
        with (root / f".pedigree/runs/{running.run_id}.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    standing = [work for work in made if work.root.exists()]
    assert standing == made[-workspace.KEPT_FOLDERS - 1 :]  # the newest was made after the clearing
    branches = git_lines(root, "branch", "--list", "runs/*", "--format=%(refname:short)")
    assert branches == sorted(work.branch for work in [running, *made])


def test_a_folder_that_was_deleted_by_hand_is_forgotten(tmp_path, recipe):
    root = make_repository(tmp_path)
    with open_workspace(root, recipe, ["photos/ab12"]) as work:
        pass
    subprocess.run(["rm", "-rf", str(work.root)], check=True)
    with open_workspace(root, recipe, ["photos/ab12"]) as other:
        pass
    listed = "\n".join(git_lines(root, "worktree", "list"))
    assert str(other.root) in listed
    assert str(work.root) not in listed


def test_no_repository_and_no_commit(tmp_path, recipe):
    with (
        pytest.raises(WorkspaceError, match="is not a git repository, and a run is a commit: `git init`"),
        open_workspace(tmp_path, recipe, []),
    ):
        pass
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(WorkspaceError, match="has no commit yet, and a run is a commit"):
        snapshot(tmp_path, PARAMS, [], "Run")


def test_no_git_identity_works(tmp_path, recipe, monkeypatch):
    root = make_repository(tmp_path)
    git(root, "config", "--unset", "user.name")
    git(root, "config", "--unset", "user.email")
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, os.fspath(tmp_path / "nobody"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("EMAIL", "GIT_AUTHOR_EMAIL", "GIT_AUTHOR_NAME", "GIT_COMMITTER_EMAIL", "GIT_COMMITTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    with open_workspace(root, recipe, ["photos/ab12"]) as work:
        assert git(work.root, "show", "-s", "--format=%an <%ae>", "HEAD") == "Pedigree <pedigree@localhost>"


def test_the_users_identity_is_kept(tmp_path, recipe):
    root = make_repository(tmp_path)
    with open_workspace(root, recipe, ["photos/ab12"]) as work:
        assert git(work.root, "show", "-s", "--format=%an <%ae>", "HEAD") == "Test <test@localhost>"


def test_params_keep_the_checkouts_own_text_where_it_says_the_same(tmp_path, recipe):
    own = (PROJECT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(own)
    assert params_text(tmp_path, load_recipe(tmp_path, None)) == own
    changed = load_recipe(tmp_path, None, ["distill.steps=20"])
    written = yaml.safe_load(params_text(tmp_path, changed))
    expected = yaml.safe_load(own)
    expected["distill"]["steps"] = 20
    expected["distill"]["optimizer"]["warmup_steps"] = 1  # in proportion
    assert written == expected
    assert yaml.safe_load(params_text(tmp_path / "none", recipe)) == yaml.safe_load(own)
