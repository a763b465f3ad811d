"""What stays and what goes, in git repositories made by hand, without DVC and services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.core.git import git
from components.lineage.claims import Claim
from components.lineage.keeping import Rule, kept_runs, needed_objects
from components.lineage.local_state import caches_removal, checkpoints_removal
from components.lineage.lock_file import RecordError
from components.lineage.needs import Needs
from components.lineage.removal import disk_bytes, own_bytes
from components.lineage.runs import find_runs

LISTING = json.dumps([{"md5": "c" * 32, "relpath": "x"}, {"md5": "d" * 32, "relpath": "y"}]).encode()
OLD, NOW = 1_000_000_000, 2_000_000_000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@localhost")
    folder = tmp_path / "main"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "params.yaml").write_text("name: pedigree\n")
    commit(folder, "start")
    return folder


def commit(root: Path, message: str, time: int = NOW) -> str:
    git(root, "add", "--all")
    when = {f"GIT_{role}_DATE": f"{time} +0000" for role in ("AUTHOR", "COMMITTER")}
    git(root, "commit", "--quiet", "--allow-empty", "--message", message, extra=when)
    return git(root, "rev-parse", "HEAD")


def make_run(root: Path, name: str, time: int = OLD, params: str = "name: pedigree\n", md5: str = "a" * 32) -> str:
    """A branch of a run with one stage; returns its last commit."""
    git(root, "checkout", "--quiet", "-b", f"runs/{name}", "main")
    (root / "params.yaml").write_text(params)
    commit(root, f"Run {name}", time)
    (root / "dvc.lock").write_text(lock({"path": "out", "md5": md5}))
    commit(root, "one: ran for 1 s", time)
    sha = commit(root, "Run finished", time)
    git(root, "checkout", "--quiet", "main")
    return sha


def lock(*outs: dict[str, str]) -> str:
    return yaml.safe_dump({"schema": "2.0", "stages": {"one": {"cmd": "x", "outs": list(outs)}}})


def ids(number: int) -> str:
    return f"20260101-00000{number}-0000"


def test_which_runs_stay_and_why(root: Path, tmp_path: Path):
    made = [make_run(root, ids(n), OLD + n) for n in range(6)]
    make_run(root, ids(6), NOW)  # young, and the newest
    make_run(root, ids(7), OLD + 7, params=f"name: pedigree\nteacher: .pedigree/runs/{ids(1)}/models/adapted\n")
    git(root, "worktree", "add", "--quiet", "--detach", str(tmp_path / "audit"), made[2])
    claims = [
        Claim("registered", "version x/1", frozenset([ids(3), "of-elsewhere"]), frozenset()),
        Claim("audited", "audit event x/1", frozenset(), frozenset([made[4], "0" * 40])),
        Claim("registered", "version x/2", frozenset(), frozenset([git(root, "rev-parse", "main")])),
    ]
    runs = find_runs(root)
    assert [run.id for run in runs] == [ids(n) for n in (6, 7, 5, 4, 3, 2, 1, 0)]
    assert kept_runs(root, runs, Rule(2, NOW - 10), claims) == {
        ids(6): "newest: among the newest 2",
        ids(7): "newest: among the newest 2",
        ids(3): "registered: version x/1",
        ids(4): "audited: audit event x/1",
        ids(2): f"checked out: in {tmp_path / 'audit'}",
        ids(1): f"named: by params.yaml of run {ids(7)}",
    }
    assert kept_runs(root, runs, Rule(0, NOW - 10), [])[ids(6)].startswith("young: ")
    (root / "params.yaml").write_text(f"name: pedigree\nweights: {ids(0)}\n")
    assert kept_runs(root, runs, Rule(0, NOW + 10), []) == {
        ids(2): f"checked out: in {tmp_path / 'audit'}",
        ids(0): "named: by params.yaml of the checkout",
    }


def test_what_commits_folders_and_history_need(root: Path):
    listings = {f"{'b' * 32}.dir": LISTING}
    (root / "data").mkdir()
    (root / "data/old.dvc").write_text(yaml.safe_dump({"outs": [{"path": "old", "md5": "e" * 32}]}))
    commit(root, "An old snapshot")
    (root / "data/old.dvc").unlink()
    (root / "dvc.lock").write_text(
        lock({"path": "m", "md5": f"{'b' * 32}.dir"}, {"path": "n", "md5": f"{'f' * 32}.dir"})
    )
    head = commit(root, "A record")
    needs = Needs(root, listings.get)
    assert needs.of_commit(head) == {f"{'b' * 32}.dir", "c" * 32, "d" * 32, f"{'f' * 32}.dir"}
    assert needs.unlisted == {f"{'f' * 32}.dir"}
    assert needs.of_commit(f"{head}^") == needs.of_history([head]) == {"e" * 32}
    (root / "data/new.dvc").write_text(yaml.safe_dump({"outs": [{"path": "new", "md5": "1" * 32}]}))  # not committed
    assert needs.of_folder(root) == needs.of_commit(head) | {"1" * 32}
    (root / "data/new.dvc").write_text("<<<<<<< ours")
    with pytest.raises(RecordError, match=r"new\.dvc: not (readable as YAML|as DVC writes it), so the data"):
        needs.of_folder(root)


def test_objects_of_everything_but_the_runs_that_go(root: Path):
    make_run(root, ids(1), md5="1" * 32)
    make_run(root, ids(2), md5="2" * 32)
    make_run(root, ids(3), md5="3" * 32)
    git(root, "tag", "-a", "-m", "kept", "milestone", f"runs/{ids(3)}")
    away = [run for run in find_runs(root) if run.id != ids(2)]
    elsewhere = Claim("registered", "version y/1", frozenset(["z"]), frozenset(["0" * 40]), frozenset(["9" * 32]))
    needs = Needs(root, lambda _: None)
    kept = needed_objects(root, away, [elsewhere], needs, ["1" * 32])
    assert kept.ids == {"2" * 32, "3" * 32}  # a tag keeps what its run made
    assert kept.elsewhere == ["version y/1"]
    with pytest.raises(RecordError, match="version y/1: commit 000000000000 is not in this repository"):
        needed_objects(root, away, [elsewhere], needs, ["9" * 32])
    unreachable = Claim("registered", "version y/2", frozenset(), frozenset([away[-1].tip]))
    assert "1" * 32 in needed_objects(root, away, [unreachable], needs, []).ids


def aged(path: Path, text: str = "x" * 100, time: int = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time, time))
    return path


def training(root: Path, key: str, commit: str, time: int = OLD, **config: str) -> Path:
    folder = root / ".pedigree/checkpoints" / key
    aged(folder / "step_5/model.safetensors", time=time)
    aged(folder / "lock", "", time)
    aged(folder / "config.json", json.dumps({"git_commit": commit, "config": config}), time)
    return folder


def test_checkpoints_of_old_trainings_that_nobody_holds(tmp_path: Path):
    stays = [
        training(tmp_path, "of-a-kept-run", "kept"),
        training(tmp_path, "young", "gone", NOW),
        training(tmp_path, "on-s3", "gone", checkpoint_uri="s3://bucket/checkpoints/"),
        training(tmp_path, "held", "gone"),
    ]
    goes = training(tmp_path, "goes", "gone")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(stays[-1] / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        os.utime(stays[-1] / "lock", (OLD, OLD))
        removal, notes = checkpoints_removal(tmp_path, {"kept"}, NOW - 10)
        assert list(removal.found) == [".pedigree/checkpoints/goes"]
        assert removal.freed == own_bytes(goes)
        removal.carry_out()
        removal.carry_out()  # again, as after a kill
        trainer.communicate(b"\n")
    assert sorted((tmp_path / ".pedigree/checkpoints").iterdir()) == sorted(stays)
    assert "1 stopped trainings keep checkpoints on S3" in notes[0]
    assert "s3://bucket/checkpoints/on-s3" in notes[0]


def test_caches_that_were_not_used_for_long(tmp_path: Path):
    caches = tmp_path / ".pedigree/cache"
    goes = [aged(caches / "models/old/model.safetensors").parent, aged(caches / "shards/block")]
    used = aged(caches / "embeddings/digest/one.npy")
    os.utime(used, (NOW, OLD))  # read a short time ago, though not written
    for path in ("models/.new.abcdefgh/part", "shards/locks/write", "embeddings/digest/two.npy"):
        aged(caches / path)
    removal = caches_removal(tmp_path, NOW - 10)
    assert sorted(removal.found) == sorted(str(path.relative_to(tmp_path)) for path in goes)
    assert removal.freed == 200
    removal.carry_out()
    left = {str(path.relative_to(caches)) for path in caches.rglob("*") if path.is_file()}
    assert left == {
        "models/.new.abcdefgh/part", "shards/locks/write", "embeddings/digest/one.npy", "embeddings/digest/two.npy"
    }  # fmt: skip


def test_a_linked_file_is_counted_once(tmp_path: Path):
    aged(tmp_path / "cache/object", "x" * 5000)
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "cache/object", tmp_path / "folder/output")
    aged(tmp_path / "folder/own", "x" * 300)
    assert own_bytes(tmp_path / "folder") == 300
    assert disk_bytes(tmp_path / "cache", tmp_path / "folder") == disk_bytes(tmp_path / "cache") + 4096
