"""All faults of an evaluation set in one go, with count and example; Great Expectations judges the facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.core.progress import track
from components.core.text import one_line
from components.data.evalset import (
    EVALSET,
    GROUPS,
    JUNK,
    QUERIES,
    QUERIES_SCHEMA,
    RELATIONS,
    TARGETS,
    WITH_TARGETS,
    TargetReader,
    in_range,
    read_config,
    read_groups,
    version_of,
)
from components.data.evalset_config import EvalsetConfig, EvalsetError
from components.data.expectations import Check, DataDocs, ValidationReport, examine_manifest
from components.data.labels import TEST, TRAIN
from components.data.manifest import MANIFEST, POOL_SCHEMA, read_manifest, read_table
from components.data.mapped_set import train_labels
from components.data.targets import TargetError, decode_depth, decode_mask
from components.data.video_set import CLIPS, CLIPS_SCHEMA

ValueT = TypeVar("ValueT", np.uint8, np.float32)

pc: Any = pyarrow.compute  # created at import, invisible to pyright
OF = "evaluation set"  # what is examined, in Data Docs
FORMATS = {
    "segmentation": "masks are PNG, gray with 8 bits or with a palette",
    "depth": "depth is 16-bit PNG in millimeters or float32 npy in meters",
}


@dataclass
class Findings:
    """Checks of a set, and one line for each that failed."""

    checks: list[Check] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def require(self, name: str, meaning: str, wrong: Collection[str], checked: int) -> None:
        """Record a check.

        Args:
            name: of the check.
            meaning: what must hold.
            wrong: what fails it, as a person knows it; the first by name is the example.
            checked: how many were looked at.
        """
        self.checks.append(Check(name, meaning, checked, len(wrong)))
        if wrong:
            example = one_line(min(wrong))
            self.faults.append(f"{name}: {meaning}; {len(wrong)} of {checked} wrong, for example {example}")


def check_set(folder: Path, docs_folder: Path) -> ValidationReport:
    """Check an added set.

    Args:
        folder: the snapshot.
        docs_folder: parent of the folder that receives the Data Docs.

    Raises:
        EvalsetError: with one line for each fault.
        DatasetError: the manifest itself cannot be read.
    """
    findings = Findings()
    found = version_of(folder)
    wrong = [f"{found}, in folder {folder.name}"] if (folder / EVALSET).is_file() and found != folder.name else []
    findings.require("version_is_name", "the content has not changed since the set was added", wrong, 1)
    check_content(folder, findings, folder.parents[1])
    return judge(folder, findings, docs_folder / f"evalset-{folder.parent.name}-{folder.name}")


def judge(folder: Path, findings: Findings, docs_folder: Path) -> ValidationReport:
    """Let Great Expectations judge a snapshot's manifest and what was found of its set.

    Raises:
        EvalsetError: with one line for each fault.
    """
    examination = examine_manifest(read_manifest(folder / MANIFEST), folder)
    for check in examination.checks:
        if not check.passed:
            findings.faults.append(f"{check.name}: {check.meaning}; {check.failing} of {check.checked} wrong")
    examination.checks += findings.checks
    with DataDocs(docs_folder) as docs:
        try:
            return docs.judge(examination, OF, POOL_SCHEMA)
        except DatasetError as error:
            lines = findings.faults or [str(error)]
            raise EvalsetError("\n".join([*lines, f"all checks: {docs_folder / 'index.html'}"])) from error


def check_content(folder: Path, findings: Findings, evaluation: Path) -> None:
    """Check what a set of its task needs, over all rows of the snapshot; `evaluation` has the other sets."""
    config, table = read_config(folder), read_manifest(folder / MANIFEST)
    if config.train_set is not None:
        _check_mapped(config, table, evaluation, findings)
    elif config.task == "video":
        _check_clips(folder, table, findings)
    elif config.task != "retrieval":
        missing = [split for split in (TRAIN, TEST) if split not in set(table["split"].to_pylist())]
        findings.require("splits_filled", "train and test have images", missing, 2)
    if config.task == "classification" and config.train_set is None:
        _check_classes(table, findings)
    if config.task in WITH_TARGETS:
        _check_targets(folder, config, table, findings)
    if config.task == "retrieval":
        _check_queries(folder, table, findings)
    if config.groups:
        _check_groups(folder, config, table, findings)


def _check_labels(table: pa.Table, findings: Findings) -> None:
    rows = table.select(["label", "source_uri"]).to_pylist()
    bare = [row["source_uri"] for row in rows if not row["label"]]
    findings.require("images_labeled", "every image is below a folder of its class", bare, len(rows))


def _check_mapped(config: EvalsetConfig, table: pa.Table, evaluation: Path, findings: Findings) -> None:
    assert config.train_set is not None
    _check_labels(table, findings)
    try:
        images, known = train_labels(config.train_set, evaluation)
    except DatasetError as error:
        findings.require("train_set_known", "`train_set` is a set with train images and classes", [str(error)], 1)
        return
    name, classes = config.train_set, {known.classes[number] for number in np.unique(known.targets[known.train])}
    labels: dict[str, str] = {label: config.mapped(label) for label in table["label"].to_pylist() if label}
    strange = [f"{label} as {given}" for label, given in labels.items() if given not in classes]
    meaning = f"every class is one of {name}, by its name or by `mapping`"
    findings.require("classes_mapped", meaning, strange, len(labels))
    unused = set(config.mapping) - set(labels)
    findings.require("mapping_used", "`mapping` names classes of this set", unused, len(config.mapping))
    shared = sorted(classes & set(labels.values()))
    few = [f"only {', '.join(shared) or 'none'}"] if len(shared) < 2 else []
    findings.require("two_classes", f"two classes of {name} or more are in the set", few, 1)
    learned = set(images.images["image_id"].take(pa.array(known.train)).to_pylist())
    both = [row["source_uri"] for row in table.to_pylist() if row["image_id"] in learned]
    findings.require("images_not_learned", f"no image, by its bytes, is a train image of {name}", both, table.num_rows)


def _check_classes(table: pa.Table, findings: Findings) -> None:
    _check_labels(table, findings)
    rows = [(row["label"], row["split"]) for row in table.select(["label", "split"]).to_pylist()]
    train = {label for label, split in rows if label and split == TRAIN}
    test = {label for label, split in rows if label and split == TEST}
    findings.require("classes_in_train", "every class of test has a train image", test - train, len(test))
    few = [f"only {label}" for label in train] if len(train) < 2 else []
    findings.require("two_classes", "there are two classes or more", few, 1)


def _check_clips(folder: Path, table: pa.Table, findings: Findings) -> None:
    sizes = {row["image_id"]: _size(row) for row in table.to_pylist()}
    frames: dict[str, list[str]] = {}
    facts: dict[str, tuple[str, str]] = {}
    for row in read_table(folder / CLIPS, CLIPS_SCHEMA).to_pylist():
        frames.setdefault(row["clip"], []).append(row["image_id"])
        facts[row["clip"]] = row["label"], row["split"]
    missing = [split for split in (TRAIN, TEST) if split not in {split for _, split in facts.values()}]
    findings.require("splits_filled", "train and test have clips", missing, 2)
    lost = [clip for clip, ids in frames.items() if not sizes.keys() >= set(ids)]
    findings.require("frames_known", "frames are images of the set", lost, len(frames))
    mixed = [clip for clip, ids in frames.items() if len({sizes.get(one) for one in ids}) > 1]
    findings.require("frame_sizes", "frames of a clip have one size", mixed, len(frames))
    train, test = ({label for label, split in facts.values() if split == name} for name in (TRAIN, TEST))
    findings.require("classes_in_train", "every class of test has a train clip", test - train, len(test))
    few = [f"only {', '.join(train) or 'none'}"] if len(train) < 2 else []
    findings.require("two_classes", "there are two classes or more", few, 1)
    learned = {tuple(ids) for clip, ids in frames.items() if facts[clip][1] == TRAIN}
    both = [clip for clip, ids in frames.items() if facts[clip][1] == TEST and tuple(ids) in learned]
    findings.require("clips_in_one_split", "no clip, by its frames, is in train and in test", both, len(frames))


@dataclass
class _Targets:
    """What was found in the targets, as names of images."""

    missing: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=lambda: {"format": [], "size": [], "damaged": []})
    wrong: list[str] = field(default_factory=list)  # values that are not allowed
    empty: list[str] = field(default_factory=list)  # no pixel to measure
    train: set[int] = field(default_factory=set)  # pixel values of train masks


def _check_targets(folder: Path, config: EvalsetConfig, table: pa.Table, findings: Findings) -> None:
    found, reader = _Targets(), TargetReader(folder / TARGETS)
    look: Callable[..., None] = _look_at_mask if config.task == "segmentation" else _look_at_depth
    have = set(reader.ids)
    for row in track(table.to_pylist(), "check targets", table.num_rows):
        if row["image_id"] not in have:
            found.missing.append(row["source_uri"])
            continue
        try:
            look(*reader.read(row["image_id"]), row, config, found)
        except TargetError as error:
            found.refused[error.reason].append(f"{row['source_uri']}: {error.detail}")
    rows = table.num_rows
    findings.require("targets_there", "every image has a target of the same name", found.missing, rows)
    findings.require("targets_readable", "targets are whole files", found.refused["damaged"], rows)
    findings.require("target_formats", FORMATS[config.task], found.refused["format"], rows)
    findings.require("target_sizes", "targets have the size of their image", found.refused["size"], rows)
    if config.task == "segmentation":
        allowed = "masks hold the pixel values of `classes` and `ignore` only"
        findings.require("mask_values", allowed, found.wrong, rows)
        filled = "every mask has a pixel with a class, of test images in the middle square"
        findings.require("masks_filled", filled, found.empty, rows)
        unseen = [f"{name} ({value})" for value, name in config.classes.items() if value not in found.train]
        findings.require("classes_in_train", "every class is in a train mask", unseen, len(config.classes))
    else:
        findings.require("depth_values", "depth is 0 (none) or positive and finite", found.wrong, rows)
        filled = "every image has a pixel within depth_range, a test image in its middle square"
        findings.require("depth_filled", filled, found.empty, rows)


def _look_at_mask(kind: str, data: bytes, row: dict[str, str], config: EvalsetConfig, found: _Targets) -> None:
    mask = decode_mask(data, kind, _size(row))
    values = set(np.unique(mask).tolist())
    if strange := sorted(values - set(config.classes) - {config.ignore}):
        found.wrong.append(f"{row['source_uri']}: {', '.join(map(str, strange))}")
    if not np.isin(_counted(mask, row), list(config.classes)).any():
        found.empty.append(row["source_uri"])
    if row["split"] == TRAIN:
        found.train |= set(np.unique(_middle(mask)).tolist())


def _look_at_depth(kind: str, data: bytes, row: dict[str, str], config: EvalsetConfig, found: _Targets) -> None:
    depth: NDArray[np.float32] = decode_depth(data, kind, _size(row))
    bad = {
        "NaN": int(np.isnan(depth).sum()),
        "infinite": int(np.isinf(depth).sum()),
        "negative": int((np.isfinite(depth) & (depth < 0)).sum()),
    }
    if any(bad.values()):
        listed = ", ".join(f"{count} {name}" for name, count in bad.items() if count)
        found.wrong.append(f"{row['source_uri']}: {listed} of {depth.size} pixels")
    if not in_range(_counted(depth, row), config).any():
        found.empty.append(row["source_uri"])


def _counted(target: NDArray[ValueT], row: Mapping[str, Any]) -> NDArray[ValueT]:
    """Return the part of a target [H, W] that must hold a value, of a test image the middle square.

    Protocols leave out train images without a value there, with a warning.
    """
    return target if row["split"] == TRAIN else _middle(target)


def _middle(target: NDArray[ValueT]) -> NDArray[ValueT]:
    """Return the middle square of a target [H, W], of which the crop is made."""
    top, left = ((side - min(target.shape)) // 2 for side in target.shape)
    return target[top : top + min(target.shape), left : left + min(target.shape)]


def _size(row: dict[str, str]) -> tuple[int, int]:
    return int(row["width"]), int(row["height"])


def _check_queries(folder: Path, table: pa.Table, findings: Findings) -> None:
    names = dict(zip(table["image_id"].to_pylist(), table["source_uri"].to_pylist(), strict=True))
    rows = read_table(folder / QUERIES, QUERIES_SCHEMA).to_pylist()

    def name(row: dict[str, str]) -> str:
        return " -> ".join(names.get(image_id, image_id) for image_id in (row["query"], row["image_id"]))

    findings.require("queries_there", "there is a query", [] if rows else [QUERIES], 1)
    known = [name(row) for row in rows if row["query"] not in names or row["image_id"] not in names]
    findings.require("queries_known", "queries and their images are images of the set", known, len(rows))
    strange = [f"{name(row)}: {row['relation']}" for row in rows if row["relation"] not in RELATIONS]
    findings.require("relations_known", f"the relation is one of {', '.join(RELATIONS)}", strange, len(rows))
    pairs = Counter((row["query"], row["image_id"]) for row in rows)
    twice = {name(row) for row in rows if pairs[row["query"], row["image_id"]] > 1}
    findings.require("pairs_unique", "a query and an image have one relation", twice, len(pairs))
    queries = {row["query"] for row in rows}
    outside = [name(row) for row in rows if row["image_id"] in queries]
    findings.require(
        "gallery_images", "images related to a query are no queries, so in the gallery", outside, len(rows)
    )
    positive = {row["query"] for row in rows if row["relation"] != JUNK and row["image_id"] in names}
    lacking = [names.get(query, query) for query in queries - positive]
    findings.require("queries_positive", "every query has an easy or a hard image", lacking, len(queries))


def _check_groups(folder: Path, config: EvalsetConfig, table: pa.Table, findings: Findings) -> None:
    found = read_groups(folder)
    missing = [name for name in config.groups if name not in found.column_names]
    findings.require("group_columns", f"{GROUPS} has every column of `groups`", missing, len(config.groups))
    for column in (name for name in config.groups if name not in missing):
        values = dict(zip(found["image_id"].to_pylist(), found[column].to_pylist(), strict=True))
        rows: Sequence[tuple[str, str]] = list(
            zip(table["image_id"].to_pylist(), table["source_uri"].to_pylist(), strict=True)
        )
        empty = [uri for image_id, uri in rows if not (values.get(image_id) or "").strip()]
        meaning = f"every image has a value in column {column}"
        findings.require(f"group_{column}", meaning, empty, len(rows))
        if column == config.clusters:
            test = table.filter(pc.equal(table["split"], TEST))["image_id"].to_pylist()
            found_in = {values.get(image_id) for image_id in test}
            one = [f"all of {min(map(str, found_in))}"] if len(found_in) < 2 else []
            findings.require("clusters_two", "test images are of two photographs or more", one, 1)
