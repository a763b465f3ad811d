"""Stages of a run run again: equal or not, file by file, with nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.git import git
from components.lineage.ledger import Ledger, LedgerError
from flows.commands.decorators import command
from flows.commands.reproduce import reproduce as reproduce_command
from flows.reproduce import choose_stages, find_recorded, reproduce
from tests.flows.repository import git_lines, make_repository

RUN = "20260102-030405-abcd"
STAGES = """
stages:
  curate:
    cmd: sh -c 'mkdir -p sorted && sort data/pool/photos/ab12/image params.yaml > sorted/x && date +%N > now.csv'
    deps: [data/pool]
    params: [seed]
    outs: [sorted]
    metrics:
      - now.csv: {cache: false}
  adapt:
    cmd: sh -c 'mkdir -p noise reports/adapt && cp sorted/x noise/same && date +%N > noise/time &&
      echo $MACHINE > reports/adapt/result.json'
    deps: [sorted]
    outs: [noise]
    metrics:
      - reports/adapt/result.json: {cache: false}
"""


def machine(processor: str) -> str:
    return json.dumps({"machine": {"processor": processor, "threads": 2}})


@pytest.fixture(autouse=True)
def same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACHINE", machine("one"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a run: `curate` is deterministic and took 9 s, `adapt` is not and took 2 s."""
    folder = tmp_path_factory.mktemp("reproduced")
    root = make_repository(folder)
    (root / "dvc.yaml").write_text(STAGES)
    (root / ".gitignore").write_text("/.pedigree\n/sorted/\n/noise/\n/data/pool/*/?*\n!/data/pool/*/*.dvc\n")
    git(root, "checkout", "-q", "-b", f"runs/{RUN}")
    commit(root, f"Run {RUN}")
    ledger = Ledger(root)
    for stage in ledger.stages():
        subprocess.run(stage.command, shell=True, cwd=root, check=True, env={**os.environ, "MACHINE": machine("one")})
        ledger.record(stage.name)
    commit(root, "curate: ran for 9 s")
    git(root, "commit", "-q", "--allow-empty", "-m", "adapt: ran for 2 s")
    git(root, "commit", "-q", "--allow-empty", "-m", "Run finished")
    git(root, "checkout", "-q", "main")
    return root


def commit(root: Path, subject: str) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", subject)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with the remote that it names; what a test deletes is deleted in the copy only."""
    shutil.copytree(made.parent, tmp_path / "copy", symlinks=True)
    config = tmp_path / "copy/main/.dvc/config"
    config.write_text(config.read_text().replace(os.fspath(made.parent), os.fspath(tmp_path / "copy")))
    local = config.with_name("config.local")  # worktrees take the remote of the commit and this file
    local.write_text(f"['remote \"storage\"']\n    url = {tmp_path}/copy/remote\n")
    return tmp_path / "copy/main"


def by_command(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(root)
    app = typer.Typer()
    app.command()(command(checkout=False)(reproduce_command.__wrapped__))
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_it_says_what_is_equal_and_names_what_differs_and_why(root: Path, monkeypatch: pytest.MonkeyPatch):
    before = git_lines(root, "status", "--porcelain"), git_lines(root, "worktree", "list")
    shutil.rmtree(root / ".dvc/cache")  # all comes from the remote
    code, said, errors = by_command(root, monkeypatch, RUN, "--json")
    found = json.loads(said)
    adapt, curate = found["stages"]  # the quickest first
    assert (code, found["equal"], adapt["equal"], curate["equal"]) == (1, False, False, True)
    told = {out["path"]: out["differing"] for out in adapt["outputs"]}
    assert told == {"noise": ["noise/time"], "reports/adapt/result.json": []}
    reports = {out["path"]: (bool(out["differing"]), out["report"]) for out in curate["outputs"]}
    assert reports == {"now.csv": (True, True), "sorted": (False, False)}
    assert "differs: noise/time\n" in errors
    assert "adapt: processor, threads and libraries are those of the run: the stage is not deterministic\n" in errors
    assert "differs: now.csv" not in errors
    assert (git_lines(root, "status", "--porcelain"), git_lines(root, "worktree", "list")) == before
    assert not (root / ".pedigree/reproduce").exists()


def test_one_equal_stage_ends_with_0(root: Path, monkeypatch: pytest.MonkeyPatch):
    left = root / ".pedigree/reproduce"  # as a killed one leaves it
    git(root, "worktree", "add", "-q", "--detach", str(left), "main")
    code, said, _ = by_command(root, monkeypatch, RUN, "--stage", "curate")
    assert code == 0, said
    assert "curate: equal" in said
    assert "now.csv: differs; a report, which may hold times" in said
    assert not left.exists()


def test_another_machine_is_named(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MACHINE", machine("two"))
    (found,) = reproduce(find_recorded(RUN, root), ["adapt"], root)
    assert (found.equal, found.reasons) == (False, ("another processor: one in the run, two now",))
    monkeypatch.setenv("MACHINE", "{}")
    (found,) = reproduce(find_recorded(RUN, root), ["adapt"], root)
    assert found.reasons[0].startswith("the stage did not record its machine: another processor")


def test_purged_and_changed_inputs_are_refused(root: Path):
    record = find_recorded(RUN, root)
    shutil.rmtree(root / ".dvc/cache")
    remote = root.parent / "remote"
    (image,) = [path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == b"bytes"]
    image.chmod(0o644)
    image.write_bytes(b"bytEs")
    with pytest.raises(LedgerError, match=r"^data/pool/photos/ab12: not the bytes that are recorded"):
        list(reproduce(record, ["curate"], root))
    shutil.rmtree(root / ".dvc/cache")
    shutil.rmtree(remote)
    with pytest.raises(LedgerError, match=r"^data/pool/photos/ab12: its bytes are neither in the DVC cache nor on the"):
        list(reproduce(record, ["curate"], root))
    assert not (root / ".pedigree/reproduce").exists()


def test_what_is_no_run_or_no_stage_is_refused(root: Path):
    with pytest.raises(ConfigError, match="no run here"):
        find_recorded("20260102-030405-ffff", root)
    record = find_recorded(f"runs/{RUN}", root)
    assert choose_stages(record, None) == ["adapt", "curate"]
    with pytest.raises(ConfigError, match="the run recorded no stage 'x'; name one by --stage: curate, adapt"):
        choose_stages(record, "x")
    with pytest.raises(ConfigError, match="would register another version"):
        choose_stages(record, "register")
