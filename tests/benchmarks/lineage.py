"""Repositories of many data versions, and of one large one, for the benchmarks of `where-used` and `trace`."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from components.core.git import git
from components.core.layout import Layout
from components.data.manifest import MANIFEST, POOL_SCHEMA
from components.lineage.stored import object_path

POOL = "data/pool/photos"


def _ids(rows: int, seed: int) -> list[str]:
    data = np.random.default_rng(seed).bytes(32 * rows).hex()
    return sorted(data[start : start + 64] for start in range(0, len(data), 64))


def make_manifest(rows: int, seed: int) -> tuple[bytes, str]:
    """A pool manifest of random ids, and one of its ids."""
    ids, numbers = _ids(rows, seed), np.arange(rows)
    known = {"shard": "00000.tar", "format": "JPEG", "label": None, "split": None}
    columns = {
        "image_id": ids, "offset": numbers * 20_000 + 512, "length": np.full(rows, 19_000),
        "width": np.full(rows, 320), "height": np.full(rows, 240),
        "source": np.where(numbers % 3, "photos", "museum"),
        "source_uri": [f"beach/{number:07d}.jpg" for number in numbers],
        "license": np.where(numbers % 3, "CC0-1.0", "CC-BY-4.0"),
    }  # fmt: skip
    made = [pa.array(columns.get(f.name, [known.get(f.name)] * rows), f.type) for f in POOL_SCHEMA]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(made, schema=POOL_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue(), ids[rows // 2]


def repository(root: Path, versions: int, rows: int, put: Callable[[str, bytes], None]) -> tuple[list[str], str]:
    """A repository with one snapshot a commit; returns the DVC ids of the manifests, and an image of the last one."""
    git(root, "init", "--quiet")
    found, image = [], ""
    for number in range(versions):
        data, image = make_manifest(rows, number)
        md5 = _md5(data)
        listing = json.dumps([{"md5": md5, "relpath": MANIFEST}]).encode()
        put(md5, data)
        put(f"{_md5(listing)}.dir", listing)
        found.append(md5)
        file = root / f"{POOL}/{number:04d}.dvc"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"outs": [{"md5": f"{_md5(listing)}.dir", "path": f"{number:04d}"}]}))
        git(root, "add", "--force", f"{POOL}/{number:04d}.dvc")
        git(root, "commit", "--quiet", "--message", f"Snapshot {number}")
    return found, image


def into_cache(root: Path) -> Callable[[str, bytes], None]:
    """Store objects in the DVC cache of a repository."""

    def put(dvc_id: str, data: bytes) -> None:
        path = Layout(root).dvc_cache / object_path(dvc_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return put


@contextmanager
def without_registry() -> Iterator[None]:
    """Search data only."""
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
