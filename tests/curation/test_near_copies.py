"""Near copies of a file by the embeddings that a run keeps, from git and the DVC cache, in no need of any service."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.git import git
from components.curation.config import EmbedConfig
from components.curation.near_copies import checked_image, near_copies, newest_embedded
from components.curation.stage import embed
from components.data.manifest import (
    MANIFEST,
    POOL_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    read_manifest,
    write_manifest,
    write_table,
)
from components.data.shards import ShardReader, decode_image
from components.lineage.lock_file import Record
from flows.cli import app
from tests.data.test_stream import write_set

RUN, POOL, CURATED = "20260101-000000-aaaa", "data/pool/a/ab12", "data/curated"
IMAGE = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A checkout with one run, whose data is in the DVC cache only."""
    root = tmp_path_factory.mktemp("near")
    git(root, "init", "--quiet", "--initial-branch", "main")
    for key, value in (("user.name", "Test"), ("user.email", "t@localhost")):
        git(root, "config", key, value)
    rows = read_manifest(write_set(root / CURATED) / MANIFEST)
    shutil.copytree(root / CURATED, root / POOL)
    write_manifest(rows.select(POOL_SCHEMA.names), root / POOL / MANIFEST)
    write_table(pa.Table.from_pylist([], REJECTED_SCHEMA), REJECTED_SCHEMA, root / CURATED / REJECTED)
    embed(EmbedConfig(workers=1), root, 0)
    ids = {path: _put(root, path) for path in (POOL, CURATED, "data/embeddings")}
    (root / f"{POOL}.dvc").write_text(yaml.safe_dump({"outs": [{"md5": ids[POOL], "path": "ab12"}]}))
    outs = {"embed": "data/embeddings", "curate": CURATED}
    stages = {stage: {"outs": [{"path": path, "md5": ids[path]}]} for stage, path in outs.items()}
    stages["curate"] |= {"params": {"params.yaml": {"curate": {"dedup_similarity": 0.7}}}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    git(root, "checkout", "--quiet", "-b", f"runs/{RUN}")
    git(root, "add", "--force", "dvc.lock", f"{POOL}.dvc")
    git(root, "commit", "--quiet", "--message", "embed: ran for 0 s")
    return root


def _put(root: Path, path: str) -> str:
    """Store a folder in the cache as DVC does; returns its id."""
    listing = []
    for file in sorted(path for path in (root / path).rglob("*") if path.is_file()):
        listing.append({"md5": _store(root, file.read_bytes()), "relpath": file.relative_to(root / path).as_posix()})
    return _store(root, json.dumps(listing).encode(), ".dir")


def _store(root: Path, data: bytes, suffix: str = "") -> str:
    md5 = hashlib.md5(data).hexdigest()
    target = root / ".dvc/cache/files/md5" / md5[:2] / f"{md5[2:]}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return f"{md5}{suffix}"


@pytest.fixture
def saved_again(root: Path, tmp_path: Path) -> tuple[str, Path]:
    """An image of the pool, and a file with the same picture saved again."""
    row = read_manifest(root / POOL / MANIFEST).slice(IMAGE, 1).to_pylist()[0]
    stored = ShardReader(root / POOL).read(row["shard"], row["offset"], row["length"])
    decode_image(stored).save(tmp_path / "again.jpg", "JPEG", quality=70)
    return row["image_id"], tmp_path / "again.jpg"


def test_a_file_saved_again_is_found(root: Path, saved_again: tuple[str, Path]):
    image_id, file = saved_again
    record = newest_embedded(root)
    assert record == Record(root, f"runs/{RUN}")
    found = near_copies(checked_image(file), record, root)
    assert found.problem is None
    assert (found.found[0].image_id, found.found[0].collection, found.limit) == (image_id, "pool", 0.7)
    assert found.found[0].similarity > 0.9
    vectors = np.load(root / "data/embeddings/copies/pool.npy")
    assert (vectors @ vectors[IMAGE] >= 0.7).sum() <= len(found.found) + 1
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    other = near_copies(buffer.getvalue(), record, root)
    assert other.found == []
    assert other.lines()[0].startswith(f"no near copy by the embedder of runs/{RUN} (descriptor; copies have at least")


def test_why_nothing_can_be_looked_for(
    root: Path, saved_again: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PEDIGREE_DATA_BUCKET", raising=False)
    data = checked_image(saved_again[1])
    assert near_copies(data, None, root).problem == "no run here keeps embeddings"
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ConfigError, match=r"notes\.jpg: not an image that Pedigree can read"):
        checked_image(tmp_path / "notes.jpg")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(root), "clone")
    problem = near_copies(data, Record(clone, f"origin/runs/{RUN}"), clone).problem
    assert problem == "DVC remote (none): not on S3; set it in .dvc/config or PEDIGREE_DATA_BUCKET"


def test_explain_offers_them(
    root: Path, saved_again: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(root)
    image_id, file = saved_again
    done = CliRunner().invoke(app, ["curate", "--explain", str(file)])
    assert done.exit_code == 1
    assert f"error: '{file}': no such image in" in done.stderr
    asked, first, near, *_ = done.stdout.splitlines()
    assert asked == f"asked: run {RUN}"
    commit = git(root, "rev-parse", "HEAD")
    assert first == f"near copies by the embedder of {commit} (descriptor; copies have at least 0.7):"
    assert near.startswith(f"  {image_id} 0.9")
    (tmp_path / "notes.jpg").write_text("no image")
    refused = CliRunner().invoke(app, ["curate", "--explain", str(tmp_path / "notes.jpg")])
    assert (refused.exit_code, "not an image" in refused.stderr) == (2, True)
