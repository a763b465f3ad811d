"""Collections made from encoded images, as ingest writes them, and the sample pool."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from components.data.manifest import MANIFEST, POOL_SCHEMA, write_manifest
from components.data.shards import EXTENSIONS, ImageError, ShardWriter, decode_image

Encode = Callable[..., bytes]
WriteCollection = Callable[..., pa.Table]


@pytest.fixture(scope="session")
def encode() -> Encode:
    def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def images() -> Callable[..., pa.Table]:
    """Manifest rows of the given sizes; ids are the given texts or the hashes of their numbers."""

    def images(sizes: list[tuple[int, int]], ids: list[str] | None = None, source: str = "photos") -> pa.Table:
        names = ids or [hashlib.sha256(str(i).encode()).hexdigest() for i in range(len(sizes))]
        rows = [_row(name, "00000.tar", 512, 1, size, source) for name, size in zip(names, sizes, strict=True)]
        return pa.Table.from_pylist(rows, schema=POOL_SCHEMA)

    return images


@pytest.fixture(scope="session")
def write_collection() -> WriteCollection:
    """Write one snapshot below data/pool or data/evaluation; files that are no image are left out."""

    def write(
        folder: Path, files: Iterable[tuple[str, bytes]], source: str = "photos", max_bytes: int = 2**30
    ) -> pa.Table:
        by_id = {hashlib.sha256(data).hexdigest(): (name, data) for name, data in sorted(files, reverse=True)}
        snapshot = folder / source / hashlib.sha256("".join(sorted(by_id)).encode()).hexdigest()[:12]
        rows = []
        with ShardWriter(snapshot, max_bytes) as writer:
            for image_id, (name, data) in sorted(by_id.items()):
                try:
                    image = decode_image(data)
                except ImageError:
                    continue
                place = writer.add(image_id, EXTENSIONS[str(image.format)], data)
                rows.append(_row(image_id, *place, image.size, source) | {"format": image.format, "source_uri": name})
        table = pa.Table.from_pylist(rows, schema=POOL_SCHEMA)
        write_manifest(table, snapshot / MANIFEST)
        return table

    return write


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample pool as files: a folder with pool/, evaluation/ and ground_truth.json."""
    from components.data.sample_pool import build_sample_pool

    folder = tmp_path_factory.mktemp("sample") / "sample"
    build_sample_pool(folder)
    return folder


@pytest.fixture(scope="session")
def sample_workspace(sample, write_collection, tmp_path_factory) -> Path:
    """A workspace with the sample pool and its evaluation set, in several shards; copy it before writing to it."""
    root = tmp_path_factory.mktemp("workspace")
    for name, source in (("pool", "sample"), ("evaluation", "sample-evaluation")):
        files = [
            (path.relative_to(sample).as_posix(), path.read_bytes())
            for path in sorted((sample / name).rglob("*"))
            if path.is_file()
        ]
        write_collection(root / "data" / name, files, source, max_bytes=2**21)
    return root


@pytest.fixture(scope="session")
def planted(sample) -> list[dict]:
    """What was planted in the sample pool, each file and its original by image id."""

    def image_id(path: str) -> str:
        return hashlib.sha256((sample / path).read_bytes()).hexdigest()

    truth = json.loads((sample / "ground_truth.json").read_text())
    return [
        item | {"id": image_id(item["path"]), "of_id": item["of"] and image_id(item["of"])} for item in truth["planted"]
    ]


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Twelve unlike views of photographs, 160 pixels square."""
    from components.data.sample_pool import load_photographs

    chosen = [photo.convert("RGB") for name, photo in load_photographs().items() if min(photo.size) >= 300][:12]
    return [photo.crop((60, 80, 220, 240)) for photo in chosen]


@pytest.fixture
def small_workspace(tmp_path, photos, encode, write_collection) -> Path:
    """Twelve pool images in four shards, two evaluation images; one of the pool is a copy of an evaluation image."""
    files = [(f"{i}.png", encode(photo)) for i, photo in enumerate(photos[:11])]
    files.append(("leak.jpg", encode(photos[11], "JPEG", quality=70)))
    write_collection(tmp_path / "data/pool", files, max_bytes=240_000)
    flipped = photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    evaluation = [("a.png", encode(photos[11])), ("b.png", encode(flipped))]
    write_collection(tmp_path / "data/evaluation", evaluation, "benchmark")
    return tmp_path


@pytest.fixture(scope="session")
def unit_vectors() -> Callable[[int, int, int], np.ndarray]:
    def make(count: int, dim: int, seed: int) -> np.ndarray:
        vectors = np.random.default_rng(seed).standard_normal((count, dim))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return make


def _row(image_id: str, shard: str, offset: int, length: int, size: tuple[int, int], source: str) -> dict:
    return {
        "image_id": image_id,
        "shard": shard,
        "offset": offset,
        "length": length,
        "format": "PNG",
        "width": size[0],
        "height": size[1],
        "source": source,
        "source_uri": image_id,
        "license": "CC0-1.0",
        "label": None,
        "split": None,
    }
