"""The stage `embed`: what it writes, what it does not do again, and what it does with hostile bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components.core.errors import DatasetError
from components.core.layout import Layout
from components.core.storage import sha256_dir
from components.curation import embed as embed_module
from components.curation.config import CurationError, EmbedConfig, ModelConfig
from components.curation.descriptor import describe
from components.curation.embed import read_embeddings, read_scores
from components.curation.stage import embed
from components.data.manifest import MANIFEST, read_collection, read_manifest, write_manifest
from components.data.shards import BLOCK, ShardReader, decode_image
from components.model.config import Preprocessing

ONE = EmbedConfig(workers=1)
OURS = ModelConfig(weights="weights", preprocessing=Preprocessing(resize_size=32, crop_size=28), batch_size=5)


def embeddings(root, part, name):
    return root / "data/embeddings" / part / name


def cached(root):
    return {path: path.stat().st_mtime_ns for path in Layout(root).cache("embeddings").rglob("*") if path.is_file()}


def pool_images(root):
    reader, table = ShardReader(root / "data/pool"), read_collection(root / "data/pool")
    return table, [decode_image(reader.read(row["shard"], row["offset"], row["length"])) for row in table.to_pylist()]


def save_small_model(folder):
    from components.model.config import ViTConfig
    from components.model.export import save_weights
    from components.model.vit import VisionTransformer

    torch.manual_seed(0)
    save_weights(folder, VisionTransformer(ViTConfig(dim=24, depth=2, num_heads=2, image_size=28)), None, {})


def test_each_image_is_decoded_once_and_embedded_twice_and_scored(small_workspace, monkeypatch):
    from components.curation.embedders import load, resolve

    save_small_model(small_workspace / "weights")
    decoded: Counter[bytes] = Counter()

    def counted(data: bytes) -> Image.Image:
        decoded[data] += 1
        return decode_image(data)

    monkeypatch.setattr(embed_module, "decode_image", counted)
    results = embed(EmbedConfig(workers=1, semantic=OURS), small_workspace, 0)
    assert len(decoded) == 14
    assert set(decoded.values()) == {1}
    assert results == {"images": {"pool": 12, "evaluation": 2}, "dims": {"copies": 558, "semantic": 24}}

    table, images = pool_images(small_workspace)
    copies = read_embeddings(embeddings(small_workspace, "copies", "pool.npy"), table)
    assert isinstance(copies, np.memmap)
    assert copies.dtype == np.float32
    np.testing.assert_allclose(copies, describe(images), atol=1e-6)
    semantic = read_embeddings(embeddings(small_workspace, "semantic", "pool.npy"), table)
    expected = load(resolve(OURS, small_workspace))(images)
    np.testing.assert_allclose(semantic, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    scores = read_scores(embeddings(small_workspace, "scores", "pool.parquet"), table)
    pixels = [np.asarray(image, np.int64) for image in images]  # 160 pixels square, so that each is looked at whole
    gray = [(pixel.max(axis=2) - pixel.min(axis=2) <= 8).mean() for pixel in pixels]
    np.testing.assert_allclose(scores["gray_share"], gray, atol=1e-6)
    assert scores["nsfw"].null_count == scores["faces"].null_count == 12
    evaluation = read_collection(small_workspace / "data/evaluation")
    assert read_embeddings(embeddings(small_workspace, "copies", "evaluation.npy"), evaluation).shape == (2, 558)
    definition = json.loads((small_workspace / "data/embeddings/embedder.json").read_text())
    assert definition["config"]["semantic"]["weights"] == "weights"
    assert set(definition["digests"]) == {"copies", "semantic", "scores"}


def test_only_new_shards_and_new_parts_are_computed(small_workspace, photos, encode, write_collection, caplog):
    caplog.set_level("INFO")
    embed(ONE, small_workspace, 0)
    first = cached(small_workspace)
    write_collection(small_workspace / "data/pool", [("new.png", encode(photos[3].rotate(90)))], "later")
    embed(ONE, small_workspace, 0)
    second = cached(small_workspace)
    assert len(second) == len(first) + 2  # the descriptors and the scores of one shard
    assert first.items() <= second.items()
    assert "pool: 1 shards embedded, 3 taken from the cache" in caplog.text
    save_small_model(small_workspace / "weights")
    embed(EmbedConfig(workers=1, semantic=OURS), small_workspace, 0)
    third = cached(small_workspace)
    assert len(third) == len(second) + 4  # the class tokens of every shard, and nothing else
    assert second.items() <= third.items()


KILLED = """
import os, signal, sys
from pathlib import Path
from components.curation import embed as module, stage
from components.curation.config import EmbedConfig
write, done = module.write_bytes, []
def write_some(path, data):
    if len(done) == 5:  # two shards, and the descriptors of a third, but not yet its scores
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
    done.append(path)
module.write_bytes = write_some
stage.embed(EmbedConfig(workers=1), Path(sys.argv[1]), 0)
"""


def test_a_killed_run_goes_on_at_the_shard_where_it_stood(small_workspace, tmp_path_factory, caplog):
    whole = tmp_path_factory.mktemp("whole") / "workspace"
    shutil.copytree(small_workspace, whole)
    embed(ONE, whole, 0)
    command = [sys.executable, "-c", KILLED, str(small_workspace)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    before = cached(small_workspace)
    assert len(before) == 5
    assert not (small_workspace / "data/embeddings").exists()
    caplog.set_level("INFO")
    caplog.clear()
    embed(ONE, small_workspace, 0)
    assert "pool: 1 shards embedded, 2 taken from the cache" in caplog.text
    assert before.items() <= cached(small_workspace).items()
    assert sha256_dir(small_workspace / "data/embeddings") == sha256_dir(whole / "data/embeddings")


def test_a_damaged_cache_entry_is_made_again(small_workspace):
    embed(ONE, small_workspace, 0)
    whole = sha256_dir(small_workspace / "data/embeddings")
    for suffix in (".npy", ".parquet"):
        path = next(path for path in cached(small_workspace) if path.suffix == suffix)
        path.write_bytes(path.read_bytes()[:200])
    embed(ONE, small_workspace, 0)
    assert sha256_dir(small_workspace / "data/embeddings") == whole


def test_damaged_or_foreign_files_of_the_stage_are_refused(small_workspace):
    embed(ONE, small_workspace, 0)
    table, path = read_collection(small_workspace / "data/pool"), embeddings(small_workspace, "copies", "pool.npy")
    with pytest.raises(CurationError, match=r"holds \(12, 558\) for 11 images; run the stage embed again"):
        read_embeddings(path, table.slice(1))
    with pytest.raises(CurationError, match="the scores of other images"):
        read_scores(embeddings(small_workspace, "scores", "pool.parquet"), table.take(pa.array(range(11, -1, -1))))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CurationError, match=r"pool\.npy: damaged \(.*\); run the stage embed again"):
        read_embeddings(path, table)
    assert read_embeddings(path, table.slice(0, 0)).shape == (0, 0)


def last_manifest(root):
    """The pool's manifest and the rows of its last shard."""
    path = next((root / "data/pool").glob(f"*/*/{MANIFEST}"))
    table = read_manifest(path)
    last = [i for i, shard in enumerate(table["shard"].to_pylist()) if shard == table["shard"][-1].as_py()]
    return path, table, last


def lie(root, column, change):
    """Change one column of the last row of the manifest."""
    path, table, _ = last_manifest(root)
    values = table[column].to_pylist()
    values[-1] = change(values)
    field = table.schema.get_field_index(column)
    write_manifest(table.set_column(field, table.schema.field(column), pa.array(values)), path)


def swap_bytes(root, data):
    """Put other bytes in place of the last image and say so in the manifest, id and all, as an attacker would."""
    import hashlib

    path, table, last = last_manifest(root)
    row = table.to_pylist()[last[-1]]
    shard = path.parent / row["shard"]
    whole = bytearray(shard.read_bytes())
    data = data[: row["length"]].ljust(row["length"], b"\0")
    whole[row["offset"] : row["offset"] + row["length"]] = data
    shard.write_bytes(whole)
    lie(root, "image_id", lambda _: hashlib.sha256(data).hexdigest())


def damage(root):
    path, table, last = last_manifest(root)
    row = table.to_pylist()[last[-1]]
    with (path.parent / row["shard"]).open("r+b") as file:
        file.seek(row["offset"] + row["length"] // 2)
        file.write(b"\xff" * 64)


def cut_short(root):
    path, table, _ = last_manifest(root)
    os.truncate(path.parent / table["shard"][-1].as_py(), 3 * BLOCK)


def truncate_manifest(root):
    path, _, _ = last_manifest(root)
    os.truncate(path, path.stat().st_size - 100)


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]  # 1.6 billion pixels, it says


HOSTILE = {
    "damaged shard": (damage, CurationError, r"image \w{64}: bytes \d+ to \d+ are not this image"),
    "shard cut short": (cut_short, DatasetError, r"bytes \d+ to \d+ are not inside its 1536 bytes"),
    "truncated manifest": (truncate_manifest, DatasetError, r"manifest\.parquet: not a readable Parquet file"),
    "past the end": (lambda root: lie(root, "length", lambda _: 10**12), DatasetError, "are not inside its"),
    "negative offset": (lambda root: lie(root, "offset", lambda _: -1), DatasetError, "are not inside its"),
    "over another": (lambda root: lie(root, "offset", lambda v: v[-1] - 9), CurationError, "are not this image"),
    "escape": (lambda root: lie(root, "shard", lambda _: "../../../../x.tar"), DatasetError, "does not lie inside"),
    "missing shard": (lambda root: lie(root, "shard", lambda _: "00099.tar"), DatasetError, "No such file"),
    "bomb": (lambda root: swap_bytes(root, bomb()), CurationError, r"too_many_pixels: more than \d+ pixels"),
    "no image": (lambda root: swap_bytes(root, b"\0" * 64), CurationError, "not_an_image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_stops_the_stage_in_one_line_and_costs_no_other_shard(small_workspace, tmp_path_factory, name):
    attack, error, told = HOSTILE[name]
    safe = tmp_path_factory.mktemp("safe") / "workspace"
    shutil.copytree(small_workspace, safe)
    (tmp_path_factory.getbasetemp() / "x.tar").write_bytes(b"secret" * 1000)
    attack(small_workspace)
    with pytest.raises(error, match=told) as raised:
        embed(ONE, small_workspace, 0)
    assert len(str(raised.value).splitlines()) == 1
    assert not (small_workspace / "data/embeddings").exists()
    if name != "truncated manifest":  # what came before the bad shard is kept
        assert len(cached(small_workspace)) >= 2 * 2
    shutil.rmtree(small_workspace / "data")
    shutil.copytree(safe / "data", small_workspace / "data")
    embed(ONE, small_workspace, 0)
    embed(ONE, safe, 0)
    assert sha256_dir(small_workspace / "data/embeddings") == sha256_dir(safe / "data/embeddings")


def test_scores_are_one_file_of_plain_parquet(small_workspace):
    embed(ONE, small_workspace, 0)
    file = pq.ParquetFile(embeddings(small_workspace, "scores", "pool.parquet"))
    assert file.metadata.num_rows == 12
    assert file.metadata.num_row_groups == 3
