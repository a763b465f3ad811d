"""`pedigree ingest` as a person runs it: a process of its own, in a real repository, with the real services."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from tests.flows.repository import make_repository

PEDIGREE = Path(sys.executable).with_name("pedigree")


def pedigree(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PEDIGREE), *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.stack
def test_a_folder_comes_into_the_pool_once(stack, tmp_path):
    root, photos = make_repository(tmp_path), tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(photos / f"{name}.jpg")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    command = ("ingest", str(photos), "--name", "shots", "--license", "CC0-1.0", "--json")

    done = pedigree(root, *command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "labels: none" not in done.stderr  # it is in the report
    assert (report["seen"], report["stored"], report["rejected"]) == (4, 3, {"truncated": 1})
    assert (report["labels"], report["unlabeled"], report["ignored"]) == ({}, 3, 0)
    assert report["notes"][0] == "labels: none; 3 images without label"
    assert report["notes"][1].startswith("rejected, truncated 1, such as broken.jpg: begins like an image")
    snapshot = root / report["pool_snapshot"]
    assert (snapshot / "manifest.parquet").exists()
    assert snapshot.with_name(snapshot.name + ".dvc").exists()

    done = pedigree(root, *command, "--quiet")
    again = json.loads(done.stdout)
    assert done.stderr == ""
    assert (again["stored"], again["already_present"], again["pool_snapshot"]) == (0, 3, None)


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    done = pedigree(tmp_path, "ingest", "photos", "--name", "No Capitals", "--license", "CC0-1.0")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".pedigree").exists()
