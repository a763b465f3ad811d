"""Streaming from the real S3 server, in small blocks so that a small set has many."""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import torch
from botocore.exceptions import IncompleteReadError, ReadTimeoutError

from components.core.errors import DatasetError
from components.core.layout import Layout
from components.core.storage import MissingInStorageError, StorageError
from components.data import remote_shards
from components.data.batch import TrainingBatches, iterate_batches
from components.data.config import StreamConfig
from components.data.manifest import MANIFEST, read_manifest
from components.data.remote_shards import RemoteShards
from components.data.shards import ShardReader
from components.data.stream import ImageStream
from tests.data.test_stream import batch, plan, write_set

BLOCK = 4096


class Remote:
    """A curated set on disk, and workspaces where only its manifest is: the shards are on S3."""

    def __init__(self, root: Path) -> None:
        self.local = write_set(root / "local")
        bucket, prefix = os.environ["PEDIGREE_DATA_BUCKET"], f"stream-{uuid.uuid4().hex[:8]}"
        self.addresses = {path.name: f"s3://{bucket}/{prefix}/{path.name}" for path in self.local.glob("*.tar")}
        for path in self.local.glob("*.tar"):
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        self.rows = read_manifest(self.local / MANIFEST).select(["image_id", "shard", "offset", "length"]).to_pylist()

    def workspace(self, root: Path, addresses: dict[str, str] | None = None) -> Path:
        """The curated set of a new workspace."""
        Layout(root).streamed.mkdir(parents=True)
        (Layout(root).streamed / MANIFEST).write_bytes((self.local / MANIFEST).read_bytes())
        (Layout(root).streamed / "shards.json").write_text(json.dumps(addresses or self.addresses))
        return root / "data" / "curated"


@pytest.fixture(scope="module")
def remote(storage, tmp_path_factory) -> Remote:
    return Remote(tmp_path_factory.mktemp("remote"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(remote_shards, "BLOCK", BLOCK)


def blocks(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.iterdir() if path.is_file()}


def requests_of(reader: RemoteShards, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    made, fetch = [], reader._fetch
    monkeypatch.setattr(reader, "_fetch", lambda shard, block: made.append((shard, block)) or fetch(shard, block))
    return made


def test_batches_are_those_of_local_shards(remote, tmp_path):
    config = StreamConfig(num_workers=2, window_shards=2)
    streamed = TrainingBatches(ImageStream(remote.workspace(tmp_path), config, seed=0), plan())
    local = TrainingBatches(ImageStream(remote.local, config, seed=0), plan())
    steps = range(2, 8)
    for ours, step in zip(iterate_batches(streamed, config, steps), steps, strict=True):
        assert torch.equal(ours.global_crops, batch(local, step).global_crops)
        assert torch.equal(ours.local_crops, batch(local, step).local_crops)
    assert len(blocks(Layout(tmp_path).cache("shards"))) >= 15


def test_reads_are_right_and_the_cache_stays_in_its_bounds(remote, tmp_path, monkeypatch):
    limit = 3 * BLOCK
    reader, local = RemoteShards(remote.addresses, tmp_path / "cache", limit), ShardReader(remote.local)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "of-a-killed-process.partial").write_bytes(bytes(5 * BLOCK))
    made = requests_of(reader, monkeypatch)
    for row in remote.rows:
        place = row["shard"], row["offset"], row["length"]
        assert reader.read(*place) == local.read(*place)
        assert sum(blocks(tmp_path / "cache").values()) <= limit
    size = (remote.local / "00000.tar").stat().st_size
    assert reader.read("00000.tar", 0, size) == (remote.local / "00000.tar").read_bytes()  # more than the cache holds
    assert sum(blocks(tmp_path / "cache").values()) <= limit
    made.clear()
    reader.read("00000.tar", 0, 10)
    reader.read("00000.tar", BLOCK, 10)
    time.sleep(0.02)
    reader.read("00000.tar", 5, 10)  # used last, so the other one goes
    reader.read("00001.tar", 0, 2 * BLOCK)
    made.clear()
    reader.read("00000.tar", 0, 10)
    assert made == []
    reader.read("00000.tar", BLOCK, 10)
    assert made == [("00000.tar", 1)]


@pytest.mark.parametrize("locks", [1024, 1])  # 1: every block waits for every other one
def test_what_is_asked_for_ahead_comes_while_nobody_waits(remote, tmp_path, monkeypatch, locks: int):
    monkeypatch.setattr(remote_shards, "_LOCKS", locks)
    reader = RemoteShards(remote.addresses, tmp_path / "cache", 100 * BLOCK)
    for row in remote.rows:
        reader.fetch_ahead(row["shard"], row["offset"], row["length"])
    reader.fetch_ahead("00000.tar", 10**9, 1)  # fails, but nobody has to know until it is read
    until = time.monotonic() + 120  # of a busy machine; a second else
    wanted = {(r["shard"], b) for r in remote.rows for b in remote_shards._blocks(r["offset"], r["length"])}
    while not all(reader._path(*one).exists() for one in wanted):
        assert time.monotonic() < until
        time.sleep(0.02)
    made = requests_of(reader, monkeypatch)
    assert all(
        hashlib.sha256(reader.read(r["shard"], r["offset"], r["length"])).hexdigest() == r["image_id"]
        for r in remote.rows
    )
    assert made == []


def test_an_answer_that_breaks_off_is_asked_for_again(remote, tmp_path, monkeypatch):
    class Broken:
        def read(self) -> bytes:
            raise IncompleteReadError(actual_bytes=1, expected_bytes=2)

    reader, client, pauses = RemoteShards(remote.addresses, tmp_path / "cache", 10**6), boto3.client("s3"), []
    answers = [{"Body": Broken()}, {"Body": Broken()}]
    reader._client = SimpleNamespace(get_object=lambda **what: answers.pop() if answers else client.get_object(**what))
    monkeypatch.setattr(remote_shards.time, "sleep", pauses.append)
    row = remote.rows[0]
    assert hashlib.sha256(reader.read(row["shard"], row["offset"], row["length"])).hexdigest() == row["image_id"]
    assert pauses == [1, 2]
    answers += [{"Body": Broken()}] * 4
    reader.forget(row["shard"], row["offset"], row["length"])
    with pytest.raises(StorageError, match="1 read, but total bytes expected is 2"):
        reader.read(row["shard"], row["offset"], row["length"])


def test_a_server_that_is_silent_is_asked_no_more_often_than_the_client_does(remote, tmp_path):
    """Which is four times a minute long; not each of these four times again."""
    asked = []

    def silent(**what: str) -> None:
        asked.append(what)
        raise ReadTimeoutError(endpoint_url="http://silent")

    reader = RemoteShards(remote.addresses, tmp_path / "cache", 10**6)
    reader._client = SimpleNamespace(get_object=silent)
    with pytest.raises(StorageError, match="Read timeout"):
        reader.read("00000.tar", 0, 10)
    assert len(asked) == 1


def test_nothing_is_dropped_from_the_cache_while_room_is_made_there(remote, tmp_path):
    reader = RemoteShards(remote.addresses, tmp_path / "cache", 10**6)
    reader.read("00000.tar", 0, 10)
    with ThreadPoolExecutor(1) as pool:
        with reader._locked("write"):
            dropping = pool.submit(reader.forget, "00000.tar", 0, 10)
            with pytest.raises(TimeoutError):
                dropping.result(timeout=0.2)
            assert len(blocks(tmp_path / "cache")) == 1
        dropping.result(timeout=20)
    assert blocks(tmp_path / "cache") == {}


def test_a_cache_that_cannot_be_used_is_one_line(remote, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match=f"^{tmp_path}/file: Not a directory; it must be writable and have space"):
        RemoteShards(remote.addresses, tmp_path / "file", 10**6).read("00000.tar", 0, 10)
    reader = RemoteShards(remote.addresses, tmp_path / "cache", 10**6)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(DatasetError, match=f"^{tmp_path}/cache: No space left; it must"):
        reader.read("00000.tar", 0, 10)


def test_wrong_places_and_objects_are_named(remote, tmp_path):
    reader = RemoteShards({**remote.addresses, "gone.tar": "s3://pedigree-data/gone"}, tmp_path / "cache", 10**6)
    size = (remote.local / "00000.tar").stat().st_size
    address = remote.addresses["00000.tar"]
    for offset, length in ((size - 5, 10), (size + 10 * BLOCK, 1)):
        with pytest.raises(DatasetError, match=f"{address}: bytes {offset} to {offset + length} are not all inside"):
            reader.read("00000.tar", offset, length)
    with pytest.raises(DatasetError, match="cannot be read"):
        reader.read("00000.tar", -1, 10)
    with pytest.raises(MissingInStorageError, match="s3://pedigree-data/gone: no such object"):
        reader.read("gone.tar", 0, 10)
    with pytest.raises(DatasetError, match=r"other\.tar: no address on S3 is known"):
        reader.read("other.tar", 0, 10)


def test_a_damaged_cache_heals_and_a_damaged_object_stops(remote, tmp_path):
    stream = ImageStream(remote.workspace(tmp_path), StreamConfig(window_shards=2), seed=0)
    right = stream.image(0).image.tobytes()
    for bad in (bytes(BLOCK), b""):  # the second is what a machine leaves that lost its power
        for path in Layout(tmp_path).cache("shards").glob("*-*"):
            path.write_bytes(bad)
        assert stream.image(0).image.tobytes() == right
    key = f"damaged-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").put_object(Bucket="pedigree-data", Key=key, Body=bytes(50_000))
    everywhere = dict.fromkeys(remote.addresses, f"s3://pedigree-data/{key}")
    damaged = ImageStream(remote.workspace(tmp_path / "other", everywhere), StreamConfig(window_shards=2), seed=0)
    with pytest.raises(DatasetError, match=f"{stream.image_ids(0, 1)[0]}: its bytes in shard .* another SHA-256"):
        damaged.image(0)


def test_wrong_credentials_and_a_small_cache_are_one_line(remote, tmp_path, monkeypatch):
    config, curated = StreamConfig(num_workers=1, window_shards=2), remote.workspace(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    batches = TrainingBatches(ImageStream(curated, config, seed=0), plan())
    message = r"^s3://pedigree-data/\S+: access denied \(\w+\); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY$"
    with pytest.raises(StorageError, match=message):
        list(iterate_batches(batches, config, range(1)))
    small = StreamConfig(window_shards=2, cache_gib=2e-5)
    with pytest.raises(
        DatasetError, match=r"needs 3.\d+e-05 GiB of cache for windows of 2 shards .*cache_gib is 2e-05"
    ):
        ImageStream(curated, small, seed=0)
    shutil.copytree(remote.local, curated)
    assert batch(TrainingBatches(ImageStream(curated, small, seed=0), plan()), 0) is not None  # from disk
