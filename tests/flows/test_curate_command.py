"""`pedigree curate --explain` on curated sets of runs, in their folders and in the DVC cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from components.data.manifest import CURATED_SCHEMA, REJECTED_SCHEMA, write_manifest, write_table
from flows.cli import app
from flows.commands.curate import run_ids
from tests.flows.repository import git_lines

ID = hashlib.sha256(b"image").hexdigest()


def write_set(folder: Path, cluster: str) -> Path:
    row = dict.fromkeys(CURATED_SCHEMA.names) | {
        "image_id": ID, "shard": "00000.tar", "offset": 512, "length": 1, "format": "PNG", "width": 9, "height": 9,
        "source": "photos", "source_uri": "/in/a.png", "license": "CC0-1.0",
        "origin": "balanced", "group_id": ID, "cluster_path": cluster,
    }  # fmt: skip
    out = {"image_id": "ab" * 32, "source": "photos", "source_uri": "/in/b.png", "reason": "near_duplicate",
           "duplicate_of": ID, "similarity": 0.75, "detail": "group of 2", "group_id": ID}  # fmt: skip
    write_manifest(pa.Table.from_pylist([row], CURATED_SCHEMA), folder / "manifest.parquet")
    write_table(pa.Table.from_pylist([out], REJECTED_SCHEMA), REJECTED_SCHEMA, folder / "rejected.parquet")
    return folder


def put_into_cache(folder: Path, cache: Path) -> str:
    """Store a folder as DVC does; returns its id."""
    listing = []
    for path in sorted(folder.iterdir()):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / md5[:2] / md5[2:])
        listing.append({"md5": md5, "relpath": path.name})
    text = json.dumps(listing)
    md5 = hashlib.md5(text.encode()).hexdigest()
    (cache / md5[:2]).mkdir(exist_ok=True)
    (cache / md5[:2] / f"{md5[2:]}.dir").write_text(text)
    return f"{md5}.dir"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with three runs: one of whose folder only the branch is left, one in its folder, one that failed."""
    root = tmp_path / "checkout"
    root.mkdir()
    git_lines(root, "init", "-q", "-b", "main")
    dvc_id = put_into_cache(write_set(tmp_path / "old", "1"), root / ".dvc/cache/files/md5")
    (root / "dvc.lock").write_text(
        json.dumps({"stages": {"curate": {"outs": [{"path": "data/curated", "md5": dvc_id}]}}})
    )
    git_lines(root, "add", "dvc.lock")
    git_lines(root, "-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "run")
    git_lines(root, "branch", "runs/20260101-000000-aaaa")
    write_set(root / ".pedigree/runs/20260102-000000-bbbb/data/curated", "2")
    (root / ".pedigree/runs/20260103-000000-cccc/data").mkdir(parents=True)
    monkeypatch.chdir(root)
    return root


def told(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["curate", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_newest_run_that_curated_is_asked(checkout):
    assert run_ids(checkout) == ["20260103-000000-cccc", "20260102-000000-bbbb", "20260101-000000-aaaa"]
    answer = told("--explain", ID[:10])
    assert (answer["run"], answer["cluster_path"], answer["kept"]) == ("20260102-000000-bbbb", "2", True)
    assert answer["group"] == [
        {"image_id": "ab" * 32, "where": "left out", "source": "photos", "source_uri": "/in/b.png"}
    ]


def test_a_run_whose_folder_is_gone_is_read_from_the_cache(checkout):
    answer = told("--explain", "a.png", "--run", "20260101-000000-aaaa")
    assert (answer["run"], answer["cluster_path"]) == ("20260101-000000-aaaa", "1")


def test_what_a_person_reads(checkout):
    done = CliRunner().invoke(app, ["curate", "--explain", "b.png"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "out: shows the same picture as an image that stays"
    assert f"duplicates    {ID[:16]} (kept) photos: /in/a.png, similarity 0.7500" in lines
    assert "run           20260102-000000-bbbb" in lines


def test_questions_that_have_no_answer(checkout, tmp_path, monkeypatch):
    def error(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["curate", *arguments])
        assert done.exit_code == 1
        assert done.stdout == ""
        return done.stderr

    assert "error: 'c.png': no such image in" in error("--explain", "c.png")
    assert "run nothing: no curated set of it is on this machine; runs: 2026010" in error(
        "--explain", ID, "--run", "nothing"
    )
    monkeypatch.chdir(tmp_path)
    assert "no run here has a curated set yet; start one with `pedigree run`" in error("--explain", ID)
