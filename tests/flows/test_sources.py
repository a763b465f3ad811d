"""Which snapshots a run takes: what was ingested to stay, exactly what is named, not unasked what was for one run."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.data.provenance import Provenance
from flows.cli import app
from flows.sources import choose, name_for, snapshots, source_names
from tests.flows.repository import DVC, PROJECT, git_lines, make_repository

POOL, EVALUATION = "data/pool", "data/evaluation"


def add(root: Path, place: str, source: str | None = None, one_run: bool = False) -> None:
    """A snapshot of which only the files beside its folder are there."""
    folder = root / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".dvc").write_text(f"outs: [{{md5: a.dir, size: 5, path: {folder.name}}}]\n")
    if source:
        provenance(source, one_run).write(folder)


def provenance(source: str, one_run: bool = False) -> Provenance:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    return Provenance(source=source, source_version="1", ingested_at=when, ingested_by="ina", one_run=one_run)


def test_a_run_takes_what_was_ingested_to_stay(tmp_path):
    with pytest.raises(ConfigError, match="the pool is empty: `pedigree ingest FOLDER"):
        choose(tmp_path, None)
    add(tmp_path, f"{POOL}/once/aa", "/in/once", one_run=True)
    add(tmp_path, f"{EVALUATION}/once/ab", "/in/once", one_run=True)
    add(tmp_path, f"{EVALUATION}/failed/ac", "/in/failed", one_run=True)  # nothing of it was left for training
    with pytest.raises(ConfigError, match=r"all sources \(once\) were given to one run each"):
        choose(tmp_path, None)
    add(tmp_path, f"{POOL}/sample/ba", "/in/sample")
    assert choose(tmp_path, None) == ["sample/ba"]
    for place in (f"{POOL}/photos/ca", f"{POOL}/photos/cb", f"{EVALUATION}/photos/cc", f"{EVALUATION}/benchmark/da"):
        add(tmp_path, place, "/in/photos")
    add(tmp_path, f"{POOL}/photos/cd", "/in/photos", one_run=True)  # the same name, given to one run too
    assert choose(tmp_path, None) == ["benchmark/da", "photos/ca", "photos/cb", "photos/cc"]
    assert source_names(choose(tmp_path, None)) == ["benchmark", "photos"]
    add(tmp_path, f"{POOL}/benchmark/db", "/in/once", one_run=True)  # a folder of one run takes no evaluation set away
    assert "benchmark/da" in choose(tmp_path, None)
    assert choose(tmp_path, ["benchmark/db"]) == ["benchmark/da", "benchmark/db"]


def test_a_run_takes_exactly_what_is_named(tmp_path):
    add(tmp_path, f"{POOL}/once/aa", "/in/once", one_run=True)
    add(tmp_path, f"{POOL}/once/ab", "/in/once", one_run=True)
    add(tmp_path, f"{POOL}/sample/ba")  # by an earlier version, which wrote no provenance
    add(tmp_path, f"{POOL}/photos/ca", "/in/photos")
    assert choose(tmp_path, ["once/ab"]) == ["once/ab"]
    assert choose(tmp_path, ["sample", "once/aa"]) == ["once/aa", "sample/ba"]
    with pytest.raises(ConfigError, match="no source 'cats' in the pool; known: photos, sample"):
        choose(tmp_path, ["cats"])
    with pytest.raises(ConfigError, match="no source 'once/zz' in the pool"):
        choose(tmp_path, ["once/zz"])
    with pytest.raises(ConfigError, match=r"source 'once' was given to one run .* `pedigree ingest FOLDER --name once"):
        choose(tmp_path, ["once"])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Holiday Photos (2024)", "holiday-photos-2024"), ("фото", "foto"), ("写真", "xie-zhen"),
        ("Ünïcode", "unicode"), ("---", "images"), ("🙂", "images"), ("a" * 200, "a" * 63), ("sample", "sample-2"),
    ],
)  # fmt: skip
def test_a_folder_of_any_name_gets_a_legal_one(tmp_path, folder, name):
    assert name_for(tmp_path, tmp_path / folder) == name


def test_two_folders_never_share_a_name(tmp_path):
    add(tmp_path, f"{POOL}/images/aa", str((tmp_path / "a/🙂").resolve()), one_run=True)
    add(tmp_path, f"{POOL}/long{'g' * 59}/aa", "/elsewhere")
    assert name_for(tmp_path, tmp_path / "a/🙂") == "images"  # it is that folder
    assert name_for(tmp_path, tmp_path / "b/🙂") == "images-2"
    assert name_for(tmp_path, tmp_path / f"long{'g' * 70}") == f"long{'g' * 57}-2"


def test_sources_are_listed_and_removed(tmp_path, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)
    add(root, f"{POOL}/once/ab", "/in/once", one_run=True)
    add(root, f"{EVALUATION}/benchmark/da", "/in/benchmark")
    (root / POOL / "once/cd.provenance.json").write_text("{}")  # left by an ingest that was killed
    listed = CliRunner().invoke(app, ["sources", "list", "--json"])
    rows = {row["source"]: row for row in json.loads(listed.stdout)["sources"]}
    assert {name: row["taken_by"] for name, row in rows.items()} == {
        "benchmark": "every run", "once": "its own run", "photos": "every run",
    }  # fmt: skip
    assert (rows["once"]["from"], rows["once"]["ingested_by"], rows["once"]["bytes"]) == (["/in/once"], "ina", 5)
    assert rows["once"]["training_images"] is None  # its data is not here
    assert "its own run" in CliRunner().invoke(app, ["sources", "list"]).stdout

    done = CliRunner().invoke(app, ["sources", "remove", "photos"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("removed photos: 1 snapshots, 0 images, 5 B; earlier runs keep what they used")
    assert [one.source for one in snapshots(root)] == ["once", "benchmark"]
    assert not (root / POOL / "photos").exists()
    assert git_lines(root, "status", "--porcelain", "data/pool/photos") == [" D data/pool/photos/ab12.dvc"]
    assert CliRunner().invoke(app, ["sources", "remove", "once"]).exit_code == 0
    assert not (root / POOL / "once").exists()
    again = CliRunner().invoke(app, ["sources", "remove", "once"])
    assert again.exit_code == 2
    assert "error: no source 'once' in the pool; known: benchmark" in again.output


def test_who_brought_a_snapshot_and_what_git_ignores_make_no_stage_run_again(tmp_path):
    root = make_repository(tmp_path)
    shutil.copy(PROJECT / ".dvcignore", root)
    subprocess.run([DVC, "repro", "-q", "first"], cwd=root, check=True)
    provenance("/in/photos").write(root / POOL / "photos/ab12")
    (root / POOL / "photos/.gitignore").write_text("/ab12\n/another\n")
    status = [DVC, "status", "--json", "first"]
    assert json.loads(subprocess.run(status, cwd=root, check=True, capture_output=True).stdout) == {}
    (root / POOL / "photos/ab12/image").write_text("other bytes")
    assert "first" in json.loads(subprocess.run(status, cwd=root, check=True, capture_output=True).stdout)
