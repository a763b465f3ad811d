"""Clips of a video set: frames in order, of which eight are read (arXiv:2304.07193, sec. 7.2).

The paper releases no code for video. Evenly spaced frames are those in the middle of eight equal parts of a clip, which
repeats some if it has fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.data.evaluation_set import EvaluationSet, labels_of
from components.data.labels import split_of
from components.data.manifest import read_collection, read_table, write_table

CLIPS = "clips.parquet"
CLIPS_SCHEMA = pa.schema(
    [
        pa.field("clip", pa.string(), nullable=False),  # its folder, such as train/jump/a; rows of a clip are together
        pa.field("label", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train | test
        pa.field("image_id", pa.string(), nullable=False),  # of a frame; frames are in order
    ]
)
NUM_FRAMES = 8  # read of each clip
PARTS = 4  # of the path of a frame: split, class, clip, file


@dataclass(frozen=True)
class Clips:
    """What is read of the clips of a set.

    Attributes:
        frames: distinct frames.
        rows: [C, 8] of each clip, in `frames`.
    """

    frames: EvaluationSet
    rows: NDArray[np.int64]


def clip_rows(ids: Mapping[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of `clips.parquet`, and the files that are not below `<split>/<class>/<clip>/`.

    Args:
        ids: path of each frame below the folder of images -> image_id. Numbers in names are ordered by their value.
    """
    rows: list[tuple[Any, dict[str, str]]] = []
    misplaced: list[str] = []
    for uri, image_id in ids.items():
        parts = PurePosixPath(uri).parts
        split = split_of(parts[0])
        if len(parts) != PARTS or split is None:
            misplaced.append(uri)
            continue
        clip, order = "/".join(parts[:-1]), [(part.zfill(20), part) for part in re.split(r"(\d+)", parts[-1])]
        row = {"clip": clip, "label": parts[1], "split": split, "image_id": image_id}
        rows.append(((clip, order), row))
    return [row for _, row in sorted(rows, key=lambda one: one[0])], misplaced


def evenly_spaced(count: int) -> NDArray[np.int64]:
    """Return which of a clip's frames are read, [8] ascending, the middle of each eighth of `count` frames."""
    return ((np.arange(NUM_FRAMES) + 0.5) * count / NUM_FRAMES).astype(np.int64)


def read_clips(folder: Path) -> tuple[EvaluationSet, Clips]:
    """Read a video set.

    Returns:
        An image for each clip, a frame in its middle, with the classes and splits of clips; and the frames to read.

    Raises:
        DatasetError: a missing or damaged file, or a frame that is no image of the set.
    """
    table = read_collection(folder).sort_by("image_id")
    index = {image_id: row for row, image_id in enumerate(table["image_id"].to_pylist())}
    frames: dict[str, list[int]] = {}
    facts: dict[str, dict[str, str]] = {}
    for row in read_table(folder / CLIPS, CLIPS_SCHEMA).to_pylist():
        if row["image_id"] not in index:
            raise DatasetError(f"{folder / CLIPS}: no image {row['image_id']}; see `pedigree evalset check`")
        frames.setdefault(row["clip"], []).append(index[row["image_id"]])
        facts[row["clip"]] = row
    if not frames:
        raise DatasetError(f"{folder / CLIPS}: no clips; see `pedigree evalset check`")
    chosen = np.array([np.array(one)[evenly_spaced(len(one))] for one in frames.values()])  # [C, 8]
    used, rows = np.unique(chosen, return_inverse=True)
    clips = Clips(EvaluationSet(folder, table.take(pa.array(used)), None), rows.reshape(chosen.shape))
    images = table.take(pa.array(chosen[:, NUM_FRAMES // 2]))
    for name in ("label", "split"):
        place = images.schema.get_field_index(name)
        values = pa.array([one[name] for one in facts.values()], images.schema.field(name).type)
        images = images.set_column(place, images.schema.field(name), values)
    return EvaluationSet(folder, images, labels_of(folder, images)), clips


def write_clips(rows: Iterable[Mapping[str, str]], folder: Path) -> None:
    """Write `clips.parquet`."""
    write_table(pa.Table.from_pylist(list(rows), CLIPS_SCHEMA), CLIPS_SCHEMA, folder / CLIPS)


def clips_without(snapshot: Path, staging: Path, left: set[str]) -> Iterator[str]:
    """Write the clips for a part of the images, such as after a takedown; yield what the set lost besides frames."""
    rows = read_table(snapshot / CLIPS, CLIPS_SCHEMA).to_pylist()
    kept = [row for row in rows if row["image_id"] in left]
    write_clips(kept, staging)
    if lost := {row["clip"] for row in rows} - {row["clip"] for row in kept}:
        yield f"{len(lost)} clips left out: none of their frames is left, for example {min(lost)}"
