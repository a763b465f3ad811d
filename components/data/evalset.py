"""Evaluation sets as versioned data: the files of a set beside its manifest, and the reading of it for the protocols.

A set is a snapshot below `data/evaluation/<name>/`, as ingest makes it, with `evalset.yaml` and what its task needs:
`targets.parquet` (masks or depth), `queries.parquet` (retrieval), `clips.parquet` (video), `groups.parquet` (slices). A
snapshot without `evalset.yaml` is a classification set. Files hold content only, so that equal sets have equal bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.core.config import load_yaml, validate
from components.core.errors import DatasetError
from components.core.storage import disk_errors, sha256_file, write_bytes
from components.data.evalset_config import EVALSET, EvalsetConfig
from components.data.evaluation_set import EvaluationSet, read_evaluation_set
from components.data.labels import TEST, TRAIN
from components.data.manifest import MANIFEST, read_collection, read_manifest, read_table, write_table
from components.data.mapped_set import read_mapped, train_set_folder
from components.data.targets import decode_depth, decode_mask
from components.data.video_set import CLIPS, Clips, clips_without, read_clips

TARGETS, QUERIES, GROUPS = "targets.parquet", "queries.parquet", "groups.parquet"
CONTENT = (MANIFEST, EVALSET, TARGETS, QUERIES, CLIPS, GROUPS)  # the manifest names all images by their hash
WITH_TARGETS = ("segmentation", "depth")
EASY, HARD, JUNK = RELATIONS = ("easy", "hard", "junk")
ROW_GROUP_BYTES = 2**20  # of targets: what reading one target costs at least
VERSION_DIGITS = 12
IGNORED = 255  # in a mask as it is returned, whatever value stands for it in the file

TARGETS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),  # png | npy
        pa.field("data", pa.binary(), nullable=False),  # encoded bytes, as they were given
    ]
)
QUERIES_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),  # image_id of the query
        pa.field("image_id", pa.string(), nullable=False),  # of an image of the gallery
        pa.field("relation", pa.string(), nullable=False),  # easy | hard | junk; all others are negatives
    ]
)


@dataclass(frozen=True)
class Query:
    """A query of a retrieval set, as indices into its images; all images not named here are negatives."""

    index: int  # of the query itself
    easy: NDArray[np.int64]
    hard: NDArray[np.int64]
    junk: NDArray[np.int64]  # neither right nor wrong: left out of the ranking


@dataclass(frozen=True)
class Evalset:
    """One evaluation set. Images are sorted by id; targets are read when they are asked for."""

    folder: Path
    config: EvalsetConfig
    images: EvaluationSet  # with labels for classification and video; of video a frame of each clip
    snapshots: tuple[Path, ...] = ()  # in `folder`, of a source with several; empty: `folder` is the only one
    learned: Evalset | None = None  # set of `train_set`, whose train images come first in `images`
    clips: Clips | None = None  # of video, a clip for each of `images`

    @property
    def name(self) -> str:
        """Name of the set, that of its folder in `data/evaluation`."""
        return (self.folder if self.snapshots else self.folder.parent).name

    @cached_property
    def version(self) -> str:
        """Hash of the content: 12 hexadecimal digits, and the name of the folder of a set with `evalset.yaml`."""
        if not self.snapshots:
            return version_of(self.folder)
        versions = "".join(f"{path.name} {version_of(path)}\n" for path in self.snapshots)
        return hashlib.sha256(versions.encode()).hexdigest()[:VERSION_DIGITS]

    @property
    def train(self) -> NDArray[np.int64]:
        """Indices of the train images."""
        return self.images.labels.train if self.images.labels else self._of_split(TRAIN)

    @property
    def test(self) -> NDArray[np.int64]:
        """Indices of the test images; of classification, those whose class is in train."""
        return self.images.labels.test if self.images.labels else self._of_split(TEST)

    @property
    def tested(self) -> pa.Table:
        """Rows of the images that a test reads: test images, of video the frames of test clips."""
        if self.clips is None:
            return self.images.images.take(pa.array(self.test))
        return self.clips.frames.images.take(pa.array(np.unique(self.clips.rows[self.test])))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        if self.images.labels:
            return self.images.labels.classes
        return tuple(name for _, name in sorted(self.config.classes.items()))

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Return the mask of an image: [H, W] indices into `class_names`, IGNORED for pixels without class.

        Raises:
            DatasetError: not a segmentation set, or a damaged file.
        """
        self._require("segmentation")
        kind, data = self._targets.read(self._ids[index])
        return self._class_of_value[decode_mask(data, kind, self._size(index))]

    def depth(self, index: int) -> NDArray[np.float32]:
        """Return the depth of an image: [H, W] meters, NaN without depth or outside of `config.depth_range`.

        Raises:
            DatasetError: not a depth set, or a damaged file.
        """
        self._require("depth")
        kind, data = self._targets.read(self._ids[index])
        depth = decode_depth(data, kind, self._size(index))
        return np.where(in_range(depth, self.config), depth, np.float32(np.nan))

    @cached_property
    def queries(self) -> tuple[Query, ...]:
        """The queries, in order of their index."""
        self._require("retrieval")
        found: dict[int, dict[str, list[int]]] = {}
        for row in read_table(self.folder / QUERIES, QUERIES_SCHEMA).to_pylist():
            related = found.setdefault(self._index[row["query"]], {name: [] for name in RELATIONS})
            related[row["relation"]].append(self._index[row["image_id"]])
        return tuple(
            Query(index, *(np.array(sorted(related[name]), dtype=np.int64) for name in RELATIONS))
            for index, related in sorted(found.items())
        )

    @property
    def gallery(self) -> NDArray[np.int64]:
        """Indices of the images that are no queries."""
        return np.setdiff1d(np.arange(len(self._ids)), [query.index for query in self.queries])

    @cached_property
    def groups(self) -> Mapping[str, NDArray[np.str_]]:
        """Groups by column: [N] names, in the order of the images; empty for a set without groups."""
        if not self.config.groups:
            return {}
        table = read_groups(self.folder)
        others = 0 if self.learned is None else len(self.train)  # images of another set have no group here
        rows = np.searchsorted(table["image_id"].to_numpy().astype(str), np.array(self._ids[others:]))
        return {
            name: np.concatenate([np.full(others, ""), table[name].to_numpy().astype(str)[rows]])
            for name in self.config.groups
        }

    @cached_property
    def _class_of_value(self) -> NDArray[np.uint8]:
        table = np.full(256, IGNORED, np.uint8)
        table[sorted(self.config.classes)] = np.arange(len(self.config.classes))
        return table

    @property
    def clusters(self) -> NDArray[np.str_] | None:
        """Photograph of each test image, [T], where the set says which images are parts of one; else None."""
        return None if self.config.clusters is None else self.groups[self.config.clusters][self.test]

    @cached_property
    def _ids(self) -> list[str]:
        return self.images.images["image_id"].to_pylist()

    @cached_property
    def _index(self) -> dict[str, int]:
        return {image_id: index for index, image_id in enumerate(self._ids)}

    @cached_property
    def _targets(self) -> TargetReader:
        return TargetReader(self.folder / TARGETS)

    def _of_split(self, split: str) -> NDArray[np.int64]:
        return np.flatnonzero(np.array(self.images.images["split"].to_pylist()) == split)

    def _size(self, index: int) -> tuple[int, int]:
        images = self.images.images
        return images["width"][index].as_py(), images["height"][index].as_py()

    def _require(self, task: str) -> None:
        if self.config.task != task:
            raise DatasetError(f"{self.folder}: a set of task {self.config.task}, which has nothing for {task}")


def read_evalset(folder: Path) -> Evalset:
    """Read one evaluation set.

    Args:
        folder: the snapshot, such as `data/evaluation/<name>/<snapshot>`.

    Raises:
        DatasetError: no images, or a file of the set is missing or damaged.
        ConfigError: `evalset.yaml` has a wrong value.
    """
    config = read_config(folder)
    if config.train_set is not None:
        learned = read_evalset(train_set_folder(config.train_set, folder.parents[1]))
        return Evalset(folder, config, read_mapped(folder, config), learned=learned)
    if config.task == "video":
        images, clips = read_clips(folder)
        return Evalset(folder, config, images, clips=clips)
    if config.task == "classification":
        return Evalset(folder, config, read_evaluation_set(folder))
    table = read_collection(folder).sort_by("image_id")
    return Evalset(folder, config, EvaluationSet(folder, table, None))


def read_config(folder: Path) -> EvalsetConfig:
    """Read `evalset.yaml`; a snapshot without it is a classification set under the license of its images."""
    if (folder / EVALSET).is_file():
        return validate(EvalsetConfig, load_yaml(folder / EVALSET), str(folder / EVALSET))
    licenses = sorted(read_manifest(folder / MANIFEST)["license"].unique().to_pylist())
    if not licenses:
        raise DatasetError(f"{folder}: a manifest without images; add the set again")
    return EvalsetConfig(task="classification", license=" AND ".join(licenses))


def write_config(folder: Path, config: EvalsetConfig) -> None:
    """Write `evalset.yaml`."""
    write_bytes(folder / EVALSET, config.to_yaml().encode())


def version_of(folder: Path) -> str:
    """Return the hash of a set's content: of the files that are no report, 12 hexadecimal digits."""
    lines = (f"{name} {sha256_file(folder / name)}\n" for name in CONTENT if (folder / name).is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:VERSION_DIGITS]


def known_version(folder: Path) -> str:
    """Return a set's version without reading its targets: of one with `evalset.yaml`, by the name of its folder."""
    return folder.name if (folder / EVALSET).is_file() else version_of(folder)


def named_by_version(snapshot: Path) -> Path:
    """Rename a finished set to its version, and return its folder; one without `evalset.yaml` keeps its name."""
    if not (snapshot / EVALSET).is_file():
        return snapshot
    final = snapshot.with_name(version_of(snapshot))
    if final.exists():
        shutil.rmtree(snapshot)
        return final
    return snapshot.rename(final)


def in_range(depth: NDArray[np.float32], config: EvalsetConfig) -> NDArray[np.bool_]:
    """Return which pixels of a depth map are measured, [H, W]."""
    assert config.depth_range is not None
    nearest, farthest = config.depth_range
    return np.isfinite(depth) & (depth >= nearest) & (depth <= farthest)


def groups_schema(columns: Iterable[str]) -> pa.Schema:
    """Return the schema of `groups.parquet`: one row for each image, in order of its id."""
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("image_id", *columns)])


def read_groups(folder: Path) -> pa.Table:
    """Read `groups.parquet`, with the columns that it has.

    Raises:
        DatasetError: it is missing or damaged.
    """
    try:
        columns = pq.read_schema(folder / GROUPS).names[1:]
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{folder / GROUPS}: not readable as groups: {str(error).splitlines()[0]}") from None
    return read_table(folder / GROUPS, groups_schema(columns))


class TargetWriter:
    """Writer of `targets.parquet` in small row groups, so that one target is read without the others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = pq.ParquetWriter(path, TARGETS_SCHEMA, compression="zstd")
        self._rows: list[dict[str, str | bytes]] = []
        self._bytes = 0

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    def add(self, image_id: str, kind: str, data: bytes) -> None:
        """Append one target; images come in order of their id."""
        self._rows.append({"image_id": image_id, "format": kind, "data": data})
        self._bytes += len(data)
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            with disk_errors(self._path):
                self._writer.write_table(pa.Table.from_pylist(self._rows, TARGETS_SCHEMA))
        self._rows, self._bytes = [], 0


class TargetReader:
    """Reader of `targets.parquet` by image id; keeps the last row group, for reading in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            file = pq.ParquetFile(path)
            self.ids: list[str] = file.read(TARGETS_SCHEMA.names[:1])["image_id"].to_pylist()
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise DatasetError(f"{path}: not readable as targets: {str(error).splitlines()[0]}") from None
        if not file.schema_arrow.equals(TARGETS_SCHEMA):
            raise DatasetError(f"{path}: columns {file.schema_arrow.names}; targets have {TARGETS_SCHEMA.names}")
        self._metadata = file.metadata
        sizes = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        self._place = {
            self.ids[row]: (number, row - start)
            for number, (start, end) in enumerate(pairwise(starts.tolist()))
            for row in range(start, end)
        }
        self._last: tuple[int, pa.Table] | None = None

    def read(self, image_id: str) -> tuple[str, bytes]:
        """Return format and bytes of one target.

        Raises:
            DatasetError: the image has none.
        """
        if image_id not in self._place:
            raise DatasetError(f"{self._path}: no target for image {image_id}; see `pedigree evalset check`")
        number, row = self._place[image_id]
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != number:
            with pq.ParquetFile(self._path, metadata=self._metadata) as file:
                last = self._last = (number, file.read_row_group(number))
        return last[1]["format"][row].as_py(), last[1]["data"][row].as_py()


def without_images(snapshot: Path, staging: Path, table: pa.Table) -> Iterator[str]:
    """Write the files of a set for a part of its images, such as after a takedown.

    Args:
        snapshot: the whole set; nothing is written for one without `evalset.yaml`.
        staging: where to write.
        table: manifest of the images that are left.

    Yields:
        Lines on what the set lost besides the images.
    """
    if not (snapshot / EVALSET).is_file():
        return
    config, left = read_config(snapshot), set(table["image_id"].to_pylist())
    write_config(staging, config)
    if config.task in WITH_TARGETS:
        reader = TargetReader(snapshot / TARGETS)
        with TargetWriter(staging / TARGETS) as writer:
            for image_id in filter(left.__contains__, reader.ids):
                writer.add(image_id, *reader.read(image_id))
    if config.groups:
        groups = read_groups(snapshot)
        groups = groups.filter(pa.array([image_id in left for image_id in groups["image_id"].to_pylist()]))
        write_table(groups, groups.schema, staging / GROUPS)
    if config.task == "video":
        yield from clips_without(snapshot, staging, left)
    if config.task == "retrieval":
        rows = read_table(snapshot / QUERIES, QUERIES_SCHEMA).to_pylist()
        rest = [row for row in rows if row["query"] in left and row["image_id"] in left]
        positive = {row["query"] for row in rest if row["relation"] != JUNK}
        if lost := {row["query"] for row in rest} - positive:
            yield f"{len(lost)} queries left out: none of their positives is left, for example of {min(lost)}"
        kept = [row for row in rest if row["query"] in positive]
        write_table(pa.Table.from_pylist(kept, QUERIES_SCHEMA), QUERIES_SCHEMA, staging / QUERIES)
