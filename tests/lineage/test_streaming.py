"""A clone of the repository trains with none of the images: the real DVC pushes, the real S3 server streams."""

import os
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pytest

from components.core.layout import Layout
from components.data.config import StreamConfig
from components.data.manifest import MANIFEST
from components.data.stream import ImageStream
from components.lineage.ledger import Ledger, Outcome
from components.lineage.lock_file import RecordError
from components.lineage.streaming import prepare_stream
from tests.data.test_stream import write_set

CONFIG = StreamConfig(num_workers=0, window_shards=2)
STAGES = "stages:\n  curate:\n    cmd: cp -r ready data/curated\n    deps: [seed]\n    outs: [data/curated]\n"


@pytest.fixture(scope="module")
def checkout(storage, tmp_path_factory) -> Path:
    """A repository whose curated set is recorded and pushed."""
    root = tmp_path_factory.mktemp("repository") / "checkout"
    write_set(root / "ready")
    url = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/streaming-{uuid.uuid4().hex[:8]}"
    settings = f"[core]\nremote = storage\nanalytics = false\n['remote \"storage\"']\nurl = {url}\n"
    files = {
        "seed": "0",
        ".dvc/config": settings,
        "dvc.yaml": STAGES,
        ".gitignore": "/data/curated\n/ready\n.pedigree\n/.dvc/cache\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "data").mkdir()
    git(root, "init", "-q", "-b", "main")
    ledger = Ledger(root)
    assert ledger.take_up("curate") is Outcome.CHANGED
    subprocess.run(["cp", "-r", "ready", "data/curated"], cwd=root, check=True)
    ledger.record("curate")
    git(root, "add", "-A")
    git(root, "-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "curated")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True)


def test_a_clone_streams_the_curated_set_of_its_commit(checkout, tmp_path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    assert not prepare_stream(checkout)  # it holds the images
    assert prepare_stream(clone)
    here, there = clone / "data" / "curated", checkout / "data" / "curated"
    ours, theirs = ImageStream(here, CONFIG, seed=0), ImageStream(there, CONFIG, seed=0)
    assert ours.digest == theirs.digest
    for position in range(50):
        np.testing.assert_array_equal(np.asarray(ours.image(position).image), np.asarray(theirs.image(position).image))
    assert list(Layout(clone).cache("shards").glob("*-0"))
    assert not here.exists()
    (Layout(clone).streamed / MANIFEST).write_bytes(b"of another version")
    assert prepare_stream(clone)  # each start asks for the version of dvc.lock
    assert (Layout(clone).streamed / MANIFEST).read_bytes() == (there / MANIFEST).read_bytes()
    assert Ledger(clone).take_up("curate") is Outcome.RESTORED  # DVC can still bring the set itself
    assert not prepare_stream(clone)


def test_what_is_not_recorded_is_said(checkout, tmp_path):
    assert not prepare_stream(tmp_path)  # no dvc.lock: the stage says that it has no images
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    with pytest.raises(RecordError, match=r"dvc\.lock knows no data/curated, and it is not on disk; curate first"):
        prepare_stream(tmp_path)
