"""Make an evaluation set from a user's folder: ingest its images, store what its task needs, check all of it.

The folder holds `evalset.yaml`; `images/`, with `train/` and `test/` (for classification with a folder for each class
below, for video with one for each clip below that); `targets/`, with the names of the images and .png or .npy;
`queries.csv` (query,image,relation) and `groups.csv` (image and one column each), which name images by their path below
`images/`.
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from components.core.config import ConfigError, load_yaml, validate
from components.core.layout import RELATIVE
from components.core.text import one_line
from components.data import summary
from components.data.evalset import (
    EVALSET,
    GROUPS,
    QUERIES,
    QUERIES_SCHEMA,
    TARGETS,
    WITH_TARGETS,
    TargetWriter,
    groups_schema,
    version_of,
    write_config,
)
from components.data.evalset_check import Findings, check_content, judge
from components.data.evalset_config import EvalsetConfig, EvalsetError, EvalsetRequest
from components.data.expectations import SnapshotFacts, ValidationReport
from components.data.ingest import IngestReport, hold_collection, ingest
from components.data.ingest_config import IngestError, IngestRequest
from components.data.labels import TEST, TRAIN, place, split_of
from components.data.manifest import (
    MANIFEST,
    QUARANTINE_SCHEMA,
    REJECTED,
    read_manifest,
    read_table,
    write_manifest,
    write_table,
)
from components.data.provenance import provenance_file
from components.data.sources import MAX_IMAGE_BYTES
from components.data.targets import NPY, PNG
from components.data.video_set import clip_rows, write_clips

IMAGES_FOLDER, TARGETS_FOLDER = "images", "targets"
QUERIES_CSV, GROUPS_CSV = "queries.csv", "groups.csv"
COPY = "exact_copy"  # reason of ingest that is no fault by itself
MAX_CSV_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Added:
    """An evaluation set that was made.

    Attributes:
        snapshot: its folder.
        version: its content's hash.
        config: of the set.
        images: split -> images.
        classes: label -> images of classification, clips of video.
        rows: file -> rows, of targets, queries and groups.
        notes: lines on what was left out or guessed.
        new: whether it was not there before.
        ingested: what ingest counted.
    """

    snapshot: Path
    version: str
    config: EvalsetConfig
    images: dict[str, int]
    classes: dict[str, int]
    rows: dict[str, int]
    notes: tuple[str, ...]
    new: bool
    ingested: IngestReport

    def __str__(self) -> str:
        images = ", ".join(f"{count:,} {split}" for split, count in self.images.items())
        rows = "".join(f", {count:,} {name}" for name, count in self.rows.items())
        classes = len(self.classes) or len(self.config.classes)
        return f"{self.config.task}: {images} images{f', {classes} classes' if classes else ''}{rows}"


def add_evalset(request: EvalsetRequest) -> Added:
    """Make the set and put it in place, whole or not at all.

    Args:
        request: what to read and where to put it.

    Raises:
        EvalsetError: with one line for each fault of the folder.
        ConfigError: `evalset.yaml` is missing or has a wrong value, or another version is there and not to be replaced.
    """
    with (
        hold_collection(request.evaluation),
        # Of a killed call, the next ingest deletes it.
        tempfile.TemporaryDirectory(prefix=".ingest-", dir=request.evaluation) as scratch,
    ):
        made = _make(request, Path(scratch))
        final = request.evaluation / request.name / made.version
        if not request.replace and (others := other_versions(final)):
            raise ConfigError(
                f"{request.name}: version {', '.join(others)} is there, and this is {made.version}; --replace puts "
                "this one in its place, another --name keeps both"
            )
        if new := not final.exists():
            final.parent.mkdir(exist_ok=True)
            provenance_file(made.snapshot).rename(provenance_file(final))
            made.snapshot.rename(final)
    ingested = replace(made.ingested, evaluation_snapshot=final)
    return replace(made, snapshot=final, new=new, ingested=ingested)


def other_versions(snapshot: Path) -> list[str]:
    """Return the names of the other snapshots of a set, on disk or tracked by DVC."""
    names = {path.name.partition(".")[0] for path in snapshot.parent.glob("[!.]*")}
    return sorted(names - {snapshot.name})


def check_folder(request: EvalsetRequest) -> Added:
    """Do all that `add_evalset` does, in a temporary folder that is deleted; raises what it raises."""
    with tempfile.TemporaryDirectory(prefix="pedigree-evalset-") as scratch:
        return _make(request, Path(scratch))


def _make(request: EvalsetRequest, scratch: Path) -> Added:
    """Make and check the set below a scratch folder."""
    config = _config_of(request)
    try:
        report = ingest(
            IngestRequest.parse(
                source=str(request.source / IMAGES_FOLDER),
                name=request.name,
                license=config.license,
                evaluation=scratch / RELATIVE.evaluation.name,
                as_evaluation=True,
                max_pixels=request.max_pixels,
                docs_folder=request.docs_folder,
            )
        )
    except IngestError as error:
        raise EvalsetError(f"images: {error}") from None
    assert report.evaluation_snapshot is not None
    folder = _Folder(request.source, config, report.evaluation_snapshot)
    folder.write()
    check_content(folder.snapshot, folder.findings, request.evaluation)
    validation = judge(folder.snapshot, folder.findings, request.docs_folder / f"evalset-{request.name}")
    return _describe(folder, report, validation)


def _config_of(request: EvalsetRequest) -> EvalsetConfig:
    if not (request.source / EVALSET).is_file():
        raise ConfigError(
            f"{request.source}: no {EVALSET}; it says task and license, such as `task: segmentation`; "
            "see `pedigree evalset add --help`"
        )
    values: dict[str, Any] = load_yaml(request.source / EVALSET)
    if request.license is not None:
        values = {**values, "license": request.license}
    if "license" not in values:
        raise ConfigError(f"{request.source / EVALSET}: no license; write it there, or give --license")
    return validate(EvalsetConfig, values, str(request.source / EVALSET))


class _Folder:
    """A user's folder whose images were ingested, and the files of the set that are written from it."""

    def __init__(self, source: Path, config: EvalsetConfig, snapshot: Path) -> None:
        self.source, self.config, self.snapshot = source, config, snapshot
        self.findings = Findings()
        self.notes: list[str] = []
        self.rows: dict[str, int] = {}
        self.clip_classes = Counter[str]()  # of video: label -> clips
        self.table = read_manifest(snapshot / MANIFEST)
        self.rejected = read_table(snapshot / REJECTED, QUARANTINE_SCHEMA).to_pylist()
        kept = zip(self.table["source_uri"].to_pylist(), self.table["image_id"].to_pylist(), strict=True)
        self.ids: dict[str, str] = dict(kept)  # path below images/ -> image_id, copies too
        self.ids |= {row["source_uri"]: row["image_id"] for row in self.rejected if row["reason"] == COPY}

    def write(self) -> None:
        """Write all files of the set, and record the faults that only the folder shows."""
        self._check_images()
        self._set_columns()
        write_config(self.snapshot, self.config)
        if self.config.task in WITH_TARGETS:
            self._write_targets()
        if self.config.task == "retrieval":
            self._write_queries()
        if self.config.task == "video":
            self._write_clips()
        if self.config.groups:
            self._write_groups()

    def _check_images(self) -> None:
        unreadable = [f"{row['source_uri']}: {row['detail']}" for row in self.rejected if row["reason"] != COPY]
        seen = len(self.ids) + len(unreadable)
        self.findings.require(
            "images_readable", "every file below images/ is an image that can be taken", unreadable, seen
        )
        splits = {uri: split_of(PurePosixPath(uri).parts[0]) for uri in self.ids if "/" in uri}
        if self.config.train_set is not None:
            trained = [uri for uri, split in splits.items() if split == TRAIN]
            self.findings.require("only_test_images", "a set with `train_set` has no train images", trained, seen)
        elif self.config.task != "retrieval" or any(splits.values()):
            outside = [uri for uri in self.ids if splits.get(uri) is None]
            self.findings.require("images_in_splits", "images are below images/train or images/test", outside, seen)
            present = set(splits.values())
            missing = [split for split in (TRAIN, TEST) if split not in present]
            self.findings.require("split_folders", "images/train and images/test have images", missing, 2)
        first = {image_id: uri for uri, image_id in self.ids.items()}
        both = [
            f"{uri} and {first[image_id]}" for uri, image_id in self.ids.items()
            if splits.get(uri) != splits.get(first[image_id])
        ]  # fmt: skip
        both = [] if self.config.task == "video" else both  # black frames may be anywhere; clips are checked
        self.findings.require("images_in_one_split", "no image, by its bytes, is in train and in test", both, seen)
        if copies := [row["source_uri"] for row in self.rejected if row["reason"] == COPY]:
            self.notes.append(f"copies stored once: {len(copies)}, such as {one_line(min(copies))}")

    def _set_columns(self) -> None:
        """Drop labels and splits that ingest read from folders, and this task does not have."""
        columns: dict[str, Any] = {}
        if self.config.task == "classification":
            labels = place({uri.rpartition("/")[0] for uri in self.ids}).labels
            self._check_copies({uri: str(labels[uri.rpartition("/")[0]]) for uri in self.ids}, "class")
        elif self.config.task != "video":
            columns["label"] = pa.nulls(len(self.table), pa.string())
        unsplit = self.config.task == "retrieval" and not any(split_of(uri.partition("/")[0]) for uri in self.ids)
        if unsplit or self.config.train_set is not None:
            columns["split"] = pa.array([TEST] * len(self.table))
        if not columns:
            return
        for name, values in columns.items():
            column = self.table.schema.get_field_index(name)
            self.table = self.table.set_column(column, self.table.schema.field(name), values)
        write_manifest(self.table, self.snapshot / MANIFEST)

    def _check_copies(self, content: Mapping[str, str | bytes], what: str) -> None:
        """Require that images of the same bytes have the same class, target or groups."""
        first: dict[str, str] = {}
        other = [
            f"{uri} and {first[image_id]}" for uri, image_id in self.ids.items()
            if uri in content and content[first.setdefault(image_id, uri)] != content[uri]
        ]  # fmt: skip
        self.findings.require(f"copies_of_one_{what}", f"copies of an image have the same {what}", other, len(self.ids))

    def _write_targets(self) -> None:
        stems = {uri: str(PurePosixPath(uri).with_suffix("")) for uri in self.ids}
        counts = Counter(stems.values())
        double = [uri for uri, stem in stems.items() if counts[stem] > 1]
        self.findings.require("names_unique", "no two images share a target's name", double, len(stems))
        found = {uri: list(self._targets_of(stem)) for uri, stem in stems.items()}
        twice = [uri for uri, paths in found.items() if len(paths) > 1]
        self.findings.require("one_target", "an image has one target, .png or .npy", twice, len(found))
        large = [uri for uri, paths in found.items() if paths and paths[0].stat().st_size > MAX_IMAGE_BYTES]
        self.findings.require("target_bytes", f"a target has {MAX_IMAGE_BYTES} bytes at most", large, len(found))
        copies = {row["image_id"] for row in self.rejected if row["reason"] == COPY}
        content = {uri: b"".join(path.read_bytes() for path in found[uri])
                   for uri, image_id in self.ids.items() if image_id in copies and uri not in large}  # fmt: skip
        self._check_copies(content, "target")
        self.rows[TARGETS_FOLDER] = 0
        with TargetWriter(self.snapshot / TARGETS) as writer:
            for row in self.table.select(["image_id", "source_uri"]).to_pylist():
                if (paths := found[row["source_uri"]]) and row["source_uri"] not in large:
                    writer.add(row["image_id"], paths[0].suffix[1:].lower(), paths[0].read_bytes())
                    self.rows[TARGETS_FOLDER] += 1
        self._note_left_over({path for paths in found.values() for path in paths})

    def _targets_of(self, stem: str) -> Iterator[Path]:
        for kind in (PNG, NPY):
            if (path := self.source / TARGETS_FOLDER / f"{stem}.{kind}").is_file():
                yield path

    def _note_left_over(self, used: set[Path]) -> None:
        files = (path for path in (self.source / TARGETS_FOLDER).rglob("*") if path.is_file())
        left = [path.relative_to(self.source).as_posix() for path in files if path not in used]
        if left := [name for name in left if not PurePosixPath(name).name.startswith(".")]:
            self.notes.append(
                f"files of targets/ without an image, left out: {len(left)}, such as {one_line(min(left))}"
            )

    def _write_queries(self) -> None:
        rows, unknown = [], []
        for row in self._csv(QUERIES_CSV, ("query", "image", "relation")):
            ids = self.ids.get(row["query"]), self.ids.get(row["image"])
            if None in ids:
                unknown.append(f"{row['query']} -> {row['image']}")
            else:
                rows.append({"query": ids[0], "image_id": ids[1], "relation": row["relation"]})
        total = len(rows) + len(unknown)
        self.findings.require("query_images", f"{QUERIES_CSV} names images below images/", unknown, total)
        rows.sort(key=lambda row: (row["query"], row["image_id"], row["relation"]))
        write_table(pa.Table.from_pylist(rows, QUERIES_SCHEMA), QUERIES_SCHEMA, self.snapshot / QUERIES)
        self.rows["queries"] = len({row["query"] for row in rows})

    def _write_clips(self) -> None:
        rows, misplaced = clip_rows(self.ids)
        meaning = "frames are below images/<split>/<class>/<clip>/"
        self.findings.require("frames_in_clips", meaning, misplaced, len(self.ids))
        images = self.source / IMAGES_FOLDER
        folders = {path.relative_to(images).as_posix() for path in images.glob("*/*/*") if path.is_dir()}
        clips = {row["clip"] for row in rows}
        self.findings.require("clips_filled", "every clip has a frame", folders - clips, len(folders | clips))
        write_clips(rows, self.snapshot)
        self.rows["clips"] = len(clips)
        self.clip_classes = Counter(row["label"] for row in {row["clip"]: row for row in rows}.values())

    def _write_groups(self) -> None:
        rows = list(self._csv(GROUPS_CSV, ("image", *self.config.groups)))
        unknown = [row["image"] for row in rows if row["image"] not in self.ids]
        self.findings.require("group_images", f"{GROUPS_CSV} names images below images/", unknown, len(rows))
        counts = Counter(row["image"] for row in rows)
        twice = [image for image, count in counts.items() if count > 1]
        self.findings.require("groups_once", f"{GROUPS_CSV} names an image once", twice, len(counts))
        by_image = {row["image"]: {name: row[name] for name in self.config.groups} for row in rows}
        self._check_copies({uri: str(row) for uri, row in by_image.items()}, "group")
        given = list(zip(self.table["image_id"].to_pylist(), self.table["source_uri"].to_pylist(), strict=True))
        schema = groups_schema(self.config.groups)
        values = [
            {"image_id": image_id, **(by_image.get(uri) or dict.fromkeys(self.config.groups, ""))}
            for image_id, uri in given
        ]
        write_table(pa.Table.from_pylist(values, schema), schema, self.snapshot / GROUPS)
        self.rows["group columns"] = len(self.config.groups)

    def _csv(self, name: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
        """Yield the rows of a table of the folder, stripped; what it lacks is a fault."""
        path = self.source / name
        missing, rows = list(columns), list[dict[str, str]]()
        if path.is_file():
            if path.stat().st_size > MAX_CSV_BYTES:
                raise EvalsetError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CSV_BYTES} are read")
            try:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    reader = csv.DictReader(file, restval="")
                    header = [(column or "").strip() for column in reader.fieldnames or ()]
                    reader.fieldnames = header
                    rows = list(reader)
            except (UnicodeDecodeError, csv.Error) as error:
                raise EvalsetError(f"{path}: no table in UTF-8 with commas: {error}") from None
            missing = [column for column in columns if column not in header]
            if extra := sorted(set(header) - set(columns)):
                self.notes.append(f"columns of {name} that the set does not use, left out: {', '.join(extra)}")
            twice = [column for column, count in Counter(header).items() if count > 1]
            self.findings.require(f"{path.stem}_header", f"{name} has no two columns of one name", twice, len(header))
        meaning = f"{name} is there, with the columns {','.join(columns)}"
        self.findings.require(f"{path.stem}_columns", meaning, missing, len(columns))
        for row in rows:
            yield {column: (row.get(column) or "").strip() for column in columns}


def _describe(folder: _Folder, report: IngestReport, validation: ValidationReport) -> Added:
    """Write the summary with the checks of the set beside those of its images, and count what the set has."""
    version, name = version_of(folder.snapshot), folder.table["source"][0].as_py()
    facts = SnapshotFacts(name, report.seen, report.stored, report.already_present)
    summary.write_summary(folder.snapshot, f"evaluation-{name}-{version}", facts, validation)
    labeled = folder.config.task == "classification"
    if report.labels and not labeled and not folder.clip_classes:
        folder.notes.append(f"folder names are no labels in a set of task {folder.config.task}")
    splits = Counter(folder.table["split"].to_pylist())
    return Added(
        snapshot=folder.snapshot,
        version=version,
        config=folder.config,
        images={split: splits[split] for split in (TRAIN, TEST) if splits[split]},
        classes=report.labels if labeled else dict(folder.clip_classes),
        rows=folder.rows,
        notes=tuple(folder.notes),
        new=True,
        ingested=report,
    )
