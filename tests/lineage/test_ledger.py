"""The ledger against real DVC repositories."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from components.lineage.ledger import Ledger, LedgerError, LedgerUnreachableError, Outcome
from tests.flows.repository import DVC, make_repository, write_params


def run_all(ledger: Ledger) -> dict[str, Outcome]:
    outcomes = {}
    for stage in ledger.stages():
        outcomes[stage.name] = ledger.take_up(stage.name)
        if outcomes[stage.name] is Outcome.CHANGED:
            subprocess.run(stage.command, shell=True, cwd=ledger.root, check=True)
            ledger.record(stage.name)
    return outcomes


def test_stages_are_the_dag_that_dvc_prints(tmp_path):
    root = make_repository(tmp_path)
    stages = Ledger(root).stages()
    names = [stage.name for stage in stages]
    assert all(names.index(other) < names.index(stage.name) for stage in stages for other in stage.needs)
    needs = {stage.name: stage.needs for stage in stages}
    assert needs == {"first": (), "left@a": ("first",), "left@b": ("first",), "last": ("left@a", "left@b")}
    printed = subprocess.run([DVC, "dag", "--dot"], cwd=root, capture_output=True, text=True, check=True).stdout
    edges = {(stage, other) for stage, others in needs.items() for other in others}
    for stage, other in edges:
        assert f'"{other}" -> "{stage}"' in printed


def test_unchanged_after_a_run_and_dvc_agrees(tmp_path):
    root = make_repository(tmp_path)
    ledger = Ledger(root)
    assert set(run_all(ledger).values()) == {Outcome.CHANGED}
    assert set(run_all(ledger).values()) == {Outcome.UNCHANGED}
    status = subprocess.run([DVC, "status", "--json"], cwd=root, capture_output=True, text=True, check=True)
    assert status.stdout.strip() == "{}"


def test_only_what_depends_on_a_parameter_runs_again_and_the_old_value_is_restored(tmp_path):
    root = make_repository(tmp_path)
    ledger = Ledger(root)
    run_all(ledger)
    before = (root / "last.txt").read_text()
    write_params(root, left=2)
    outcomes = run_all(ledger)
    assert outcomes["first"] is Outcome.UNCHANGED
    assert outcomes["left@a"] is outcomes["last"] is Outcome.CHANGED
    assert (root / "last.txt").read_text() != before
    write_params(root, left=1)
    assert run_all(ledger)["last"] is Outcome.RESTORED
    assert (root / "last.txt").read_text() == before


def test_another_machine_takes_up_what_was_pushed(tmp_path):
    root = make_repository(tmp_path)
    run_all(Ledger(root))
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["git", "clone", "-q", root, elsewhere], check=True)
    ledger = Ledger(elsewhere)
    assert ledger.bring_data() == 1
    assert (elsewhere / "data/pool/photos/ab12/image").read_text() == "bytes"
    ledger.fetch_run_cache()
    assert set(run_all(ledger).values()) == {Outcome.RESTORED}


def test_what_git_keeps_is_restored_elsewhere_too(tmp_path):
    root = make_repository(tmp_path)
    stages = root / "dvc.yaml"
    stages.write_text(stages.read_text().replace("outs: [last.txt]", "metrics: [{last.txt: {cache: false}}]"))
    ledger = Ledger(root)
    run_all(ledger)
    for folder in (".dvc/cache", "left", "first"):
        shutil.rmtree(root / folder)
    (root / "dvc.lock").unlink()
    (root / "last.txt").unlink()
    ledger.fetch_run_cache()
    assert set(run_all(ledger).values()) == {Outcome.RESTORED}


def test_a_missing_output_is_named(tmp_path):
    root = make_repository(tmp_path)
    ledger = Ledger(root)
    assert ledger.take_up("first") is Outcome.CHANGED
    with pytest.raises(LedgerError, match="first"):
        ledger.record("first")


def test_a_folder_without_dvc_and_a_dead_remote_are_named(tmp_path):
    with pytest.raises(LedgerError, match="not a DVC repository"):
        Ledger(tmp_path).stages()
    root = make_repository(tmp_path / "repository")
    config = root / ".dvc" / "config"
    dead = config.read_text().replace(str(tmp_path / "repository" / "remote"), "s3://bucket/dvc")
    config.write_text(dead + "    endpointurl = http://127.0.0.1:9\n    access_key_id = x\n    secret_access_key = x\n")
    ledger = Ledger(root)
    ledger.share_cache(root)
    with pytest.raises(LedgerUnreachableError, match=r"127\.0\.0\.1:9"):
        ledger.fetch_run_cache()


def test_what_the_cache_did_not_take_is_an_error(tmp_path):
    root = make_repository(tmp_path)
    image = root / "data/pool/photos/cd34/image"
    image.parent.mkdir()
    image.write_bytes(b"other bytes")
    digest = hashlib.md5(b"other bytes").hexdigest()
    place = root / ".dvc/cache/files/md5" / digest[:2]
    place.symlink_to("/proc/self")  # DVC logs that it cannot write there, and calls it done
    with pytest.raises(LedgerError, match=r"cd34\.dvc: its files are not all in the DVC cache .*disk is full"):
        Ledger(root).track(image.parent)
    place.unlink()
    assert Ledger(root).track(image.parent).endswith(".dir")


def test_a_path_with_any_characters(tmp_path):
    plain, odd = make_repository(tmp_path), tmp_path / "Größe 50% a?b#c, 'd'"
    odd.mkdir()
    root = plain.rename(odd / "main")
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(tmp_path / "remote"), "../../remote"))
    (tmp_path / "remote").rename(odd / "remote")
    (root / ".dvc/config.local").write_text(f'[core]\nsite_cache_dir = "{odd}/site"\n')
    work = tmp_path / "Läufe #1" / "run"
    subprocess.run(["git", "worktree", "add", "-q", "-b", "run", str(work)], cwd=root, check=True)
    ledger = Ledger(work)
    ledger.share_cache(root)
    assert ledger.bring_data() == 1
    assert set(run_all(ledger).values()) == {Outcome.CHANGED}
    assert set(run_all(ledger).values()) == {Outcome.UNCHANGED}
    shown = subprocess.run([DVC, "config", "--show-origin", "-l"], cwd=work, check=True, capture_output=True, text=True)
    assert f"core.site_cache_dir={odd}/site" in shown.stdout
    assert f"cache.dir={root}/.dvc/cache" in shown.stdout
    (root / ".dvc/config.local").write_text("[cache\n")
    with pytest.raises(LedgerError, match=r"config\.local cannot be read .*; mend or delete it"):
        ledger.share_cache(root)


def test_threads_take_turns(tmp_path):
    root = make_repository(tmp_path)
    ledger = Ledger(root)
    run_all(ledger)
    found: list[Outcome] = []
    threads = [threading.Thread(target=lambda: found.append(ledger.take_up("first"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Outcome.UNCHANGED] * 4
    assert Path.cwd() != root
