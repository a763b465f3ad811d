"""Find images of a run's pool and evaluation sets that look like a given one, by the run's own embedder.

A re-saved file has another SHA-256, so that it is in no manifest. The embeddings that the run keeps for copy detection
find the image that it is a copy of.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.git import git
from components.core.layout import RELATIVE, Layout
from components.core.text import one_line
from components.curation.config import CurateConfig, CurationError, EmbedderConfig
from components.curation.embed import COPIES, images_digest
from components.curation.embedders import load, resolve
from components.curation.inputs import EMBEDDER, EVALUATION, POOL
from components.data.manifest import MANIFEST
from components.data.shards import MAX_PIXELS, ImageError, decode_image
from components.lineage.image_index import Objects
from components.lineage.lock_file import Record, RecordError
from components.lineage.stored import object_path

EMBEDDINGS = str(RELATIVE.embeddings)
SHOWN = 5
BLOCK = 65_536  # rows of a product
COLUMNS = ["image_id", "source", "source_uri"]


@dataclass(frozen=True)
class Near:
    """A similar image of the pool or of an evaluation set, with its cosine similarity."""

    image_id: str
    similarity: float
    collection: str  # pool | evaluation
    source: str
    source_uri: str


@dataclass(frozen=True)
class NearCopies:
    """Images that look like a file.

    Attributes:
        revision: the run's branch or commit whose embeddings were searched.
        embedder: kind of the run's embedder.
        limit: similarity above which the run's curation takes two images for copies.
        found: images at or above it, most similar first, at most `SHOWN`.
        nearest: the most similar image.
        problem: why nothing could be searched, if so.
    """

    revision: str
    embedder: str = ""
    limit: float = 0.0
    found: list[Near] = field(default_factory=list)
    nearest: Near | None = None
    problem: str | None = None

    def lines(self) -> list[str]:
        """Return sentences for a person."""
        if self.problem:
            return [f"near copies were not looked for: {self.problem}"]
        where = f"by the embedder of {self.revision} ({self.embedder}; copies have at least {self.limit:g})"
        if not self.found and self.nearest:
            return [f"no near copy {where}; the most similar: {_shown(self.nearest)}"]
        return [f"near copies {where}:", *(f"  {_shown(near)}" for near in self.found)]


def checked_image(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ConfigError: it cannot be read, or is not an image.
    """
    try:
        data = path.read_bytes()
        decode_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        raise ConfigError(f"{path}: not an image that Pedigree can read: {error}") from None
    return data


def newest_embedded(root: Path) -> Record | None:
    """Return the record of the newest run that keeps embeddings; None if there is none."""
    order = ("for-each-ref", "--sort=-committerdate", "--format=%(refname:lstrip=2)")
    for ref in git(root, *order, "refs/heads/runs", "refs/remotes").splitlines():
        record = Record(root, ref)
        try:
            if "runs/" in ref and record.output(EMBEDDINGS):
                return record
        except RecordError:
            continue
    return None


def near_copies(data: bytes, record: Record | None, root: Path) -> NearCopies:
    """Search the embeddings of a run for images that look like this one.

    Args:
        data: of an image that can be decoded.
        record: the run's; None: there is none.
        root: the checkout.
    """
    if record is None:
        return NearCopies("", problem="no run here keeps embeddings")
    try:
        return _search(data, record, root)
    except PedigreeError as error:
        return NearCopies(record.revision or "this folder", problem=str(error))


def copied(images: Iterable[bytes], among: Collection[str], record: Record, root: Path) -> list[Near | None]:
    """Return for each image the most similar one of the pool that a run's curation takes for a copy of it.

    Args:
        images: encoded, which can be decoded; read one at a time.
        among: ids of the images of the pool that count, such as those that a training drew.
        record: the run's.
        root: the checkout.

    Raises:
        CurationError: the run's embeddings cannot be searched.
    """
    embedded = _Embedded(record, root)
    found: list[Near | None] = []
    pool, vectors = embedded.collection(POOL)
    kept = np.flatnonzero(np.isin(pool["image_id"].to_numpy(zero_copy_only=False), sorted(among)))
    pool, vectors = pool.take(pa.array(kept)), vectors[kept]
    for data in images:
        nearest = _nearest(vectors, embedded.embed(data), pool, POOL.name) if len(kept) else []
        found.append(nearest[0] if nearest and nearest[0].similarity >= embedded.limit else None)
    return found


def _search(data: bytes, record: Record, root: Path) -> NearCopies:
    embedded = _Embedded(record, root)
    vector, near = embedded.embed(data), []
    for folder in (POOL, EVALUATION):
        images, vectors = embedded.collection(folder)
        if len(images):
            near += _nearest(vectors, vector, images, folder.name)
    near.sort(key=lambda one: -one.similarity)
    found = [one for one in near if one.similarity >= embedded.limit][:SHOWN]
    return NearCopies(str(record.revision), embedded.kind, embedded.limit, found, near[0] if near else None)


class _Embedded:
    """The embeddings that a run keeps for copy detection, and its embedder.

    Raises:
        CurationError: there are none, they are of another version of Pedigree, or the embedder has changed since.
    """

    def __init__(self, record: Record, root: Path) -> None:
        self.record, self.root, self.objects = record, root, Objects(root)
        dvc_id = record.output(EMBEDDINGS)
        if dvc_id is None:
            raise CurationError(f"{record.revision}: its dvc.lock has no {EMBEDDINGS}")
        self.files = self.objects.listing(dvc_id)
        try:
            definition = json.loads(self.objects.read(self.files[EMBEDDER]))
            config = TypeAdapter[Any](EmbedderConfig).validate_python(definition["config"]["embedder"])
            digest: str = definition["digests"][COPIES]
            self.embedded: dict[str, str] = {name: definition[name] for name in (POOL.name, EVALUATION.name)}
        except (ValidationError, KeyError, TypeError):
            whose = record.revision or "this folder"
            raise CurationError(f"the embeddings of {whose} are of another version of Pedigree") from None
        embedder = resolve(config, root)
        if embedder.digest != digest:
            raise CurationError(
                f"the embedder of {record.revision} cannot be had: its code or weights have changed since"
            )
        self.kind, self.limit, self._embedder = config.kind, _limit(record), load(embedder)

    def embed(self, data: bytes) -> NDArray[np.float64]:
        """Return the vector of an image, of unit length, [D]."""
        vector = self._embedder([decode_image(data)])[0].astype(np.float64)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def collection(self, folder: Path) -> tuple[pa.Table, NDArray[np.float32]]:
        """Return the images of a collection and their vectors, [N, D]."""
        images = _images(self.objects, self.record, folder)
        if images_digest(images) != self.embedded[folder.name]:
            raise CurationError(f"{self.record.revision}: its embeddings are of other images than its {folder}")
        if not len(images):
            return images, np.zeros((0, 0), np.float32)
        return images, _vectors(self.objects, self.files[f"{COPIES}/{folder.name}.npy"], self.root)


def _images(objects: Objects, record: Record, folder: Path) -> pa.Table:
    """Return the images of a collection in the order of its embeddings, as of `read_collection`."""
    tables = []
    tracked = record.tracked(str(folder))
    for path in sorted(tracked, key=PurePosixPath):
        tables.append(objects.table(objects.listing(tracked[path])[MANIFEST]).select(COLUMNS))
    return pa.concat_tables(tables) if tables else pa.table({name: pa.array([], pa.string()) for name in COLUMNS})


def _vectors(objects: Objects, dvc_id: str, root: Path) -> NDArray[np.float32]:
    """Return embeddings [N, D], memory-mapped if the DVC cache has them."""
    cached = Layout(root).dvc_cache / object_path(dvc_id)
    source: Any = cached if cached.is_file() else io.BytesIO(objects.read(dvc_id))
    return np.load(source, mmap_mode="r" if cached.is_file() else None, allow_pickle=False)


def _nearest(
    vectors: NDArray[np.float32], vector: NDArray[np.float64], images: pa.Table, collection: str
) -> list[Near]:
    parts = [vectors[start : start + BLOCK] @ vector for start in range(0, len(vectors), BLOCK)]
    similarity = np.concatenate(parts)  # [N]
    best = np.argsort(-similarity, kind="stable")[:SHOWN]
    rows = images.take(pa.array(best)).to_pylist()
    return [
        Near(row["image_id"], round(float(similarity[at]), 4), collection, row["source"], row["source_uri"])
        for at, row in zip(best, rows, strict=True)
    ]


def _limit(record: Record) -> float:
    """Return `dedup_similarity` of the run's curation."""
    given: Mapping[str, Any] = record.stages().get("curate", {}).get("params", {}).get(str(RELATIVE.params), {})
    default = CurateConfig.model_fields["dedup_similarity"].default
    return float((given.get("curate") or {}).get("dedup_similarity", default))


def _shown(near: Near) -> str:
    place = f"{near.source}: {one_line(near.source_uri, 80)}"
    return f"{near.image_id} {near.similarity:.4f} ({near.collection}) {place}"
