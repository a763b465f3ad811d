"""Ingest a source into a collection: examine every file, store each image once, and record why others are rejected.

A snapshot holds only images that are new to the collection, sorted by `image_id`, and appears once it is validated. The
metadata of all files of one ingest is held in memory (about 1 KB per file), but not their pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from components.core.engine import map_shards
from components.core.locks import try_lock
from components.core.progress import track
from components.core.storage import atomic_dir, recover_dirs
from components.core.text import one_line
from components.core.user import user_name
from components.data import expectations, ingest_lines, sources, summary
from components.data.ingest_config import IngestError, IngestRequest
from components.data.manifest import (
    MANIFEST,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    REJECTED,
    read_manifest,
    write_manifest,
    write_table,
)
from components.data.provenance import Provenance, read_provenance
from components.data.shards import EXTENSIONS, MAX_PIXELS, PIXEL_CEILING, ImageError, ShardWriter, decode_noted
from components.data.tombstones import WITHDRAWN, NearCopies, Withdrawn, read_withdrawn, tombstone_folder

logger = logging.getLogger(__name__)

SMALL_SOURCE_BYTES = 256 * 1024**2  # below this, starting worker processes takes longer than reading
STORED = ("image_id", "label", "split", "source_uri", "license")  # of a row; the rest follows from the image's bytes
DECODED_BYTES = 40  # memory per pixel during decoding; measured: at most 36 (four channels of 16 bits)

TOO_MANY_PIXELS = (
    f"; `pedigree ingest --max-pixels` raises that to {PIXEL_CEILING} at most, for {DECODED_BYTES} bytes of memory a "
    "pixel; or make the image smaller, or cut it into tiles"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of examining one file, row or archive member."""

    uri: str  # relative to the source's root
    folder: str = ""  # as in `Entry`
    label: str | None = None
    split: str | None = None
    image_id: str | None = None
    reason: str | None = None  # why it is rejected
    detail: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    path: str = ""  # the local file that holds its bytes
    offset: int = 0
    length: int = 0
    notes: tuple[str, ...] = ()  # what decoding changed or dropped


@dataclass(frozen=True)
class IngestReport:
    """Result of one ingest. seen = stored + held_out + already_present + all rejected."""

    seen: int
    stored: int  # in the pool, or in the evaluation set if the whole source is one
    held_out: int  # of a pool source, in the evaluation set
    already_present: int
    rejected: dict[str, int]  # reason -> files
    ignored: int  # hidden files and the like
    labels: dict[str, int]  # label -> images, including those already present
    unlabeled: int  # images without label
    notes: tuple[str, ...]  # lines on labels, and on what was guessed, followed or left out
    bytes_stored: int
    source_version: str
    pool_snapshot: Path | None  # the new folder; None if nothing was new
    evaluation_snapshot: Path | None
    holds: tuple[Path, ...] = ()  # of an ingest for one run: snapshots with the source's present content

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items()) or "none"
        held_out = f", {self.held_out} held out for evaluation" if self.held_out else ""
        stored = f"{self.stored} new images stored"
        if self.pool_snapshot is None and self.evaluation_snapshot is None:
            stored = "nothing new, no snapshot made"
        report_text = f"{self.seen} seen: {stored}{held_out}, {self.already_present} already there, "
        return f"{report_text}rejected: {reasons}, ignored: {self.ignored}"


@dataclass(frozen=True)
class _Account:
    """All findings of a source, sorted by outcome."""

    images: list[Finding]  # distinct, sorted by image_id, as are the next two
    pool: list[Finding]  # new images, as in the next
    evaluation: list[Finding]
    all_evaluation: list[Finding]  # including images already present
    rejected: list[Finding]
    copies: list[tuple[Finding, Finding]]  # the image that is kept, and its copy
    relabeled: list[tuple[Finding, str | None]]  # present image, with the different label it has there
    used: list[Path]  # of an ingest for one run: snapshots with the images already present
    facts: expectations.SnapshotFacts


def ingest(request: IngestRequest) -> IngestReport:
    """Store the new images of a source as validated snapshots.

    Args:
        request: what to read and where to put it.

    Raises:
        IngestError: the source does not exist, has no images, or changes while it is read.
        DatasetError: the validation failed; nothing is stored.
        StorageError: S3 does not answer.
    """
    home = request.evaluation if request.as_evaluation else request.pool
    held = {home, request.evaluation} if request.holdout else {home}
    with ExitStack() as stack:
        for collection in sorted(held):
            stack.enter_context(hold_collection(collection))
        spool = stack.enter_context(tempfile.TemporaryDirectory(prefix=".ingest-", dir=home))
        listing = sources.list_source(request.source, Path(spool))
        findings = _examine(listing, request)
        if not any(finding.reason is None for finding in findings):
            raise IngestError(_no_images(request.source, findings, listing))
        findings, placed, origin = ingest_lines.label_findings(findings, listing)
        account = _settle(findings, request)
        # Both are written and validated before they are renamed into place at the end of the block.
        pool = _write_snapshot(request.pool, account.pool, account, request, stack)
        evaluation = _write_snapshot(request.evaluation, account.evaluation, account, request, stack)
        provenance = _provenance(findings, request)
        for folder in filter(None, (pool, evaluation)):
            provenance.write(folder)
    notes = [
        *ingest_lines.one_run_lines(account.images, request),
        *ingest_lines.label_lines(account.images, placed, origin, not request.as_evaluation),
        *ingest_lines.evaluation_lines(account.images, account.all_evaluation, account.copies),
        *ingest_lines.relabeled_lines(account.relabeled),
        *ingest_lines.source_lines(listing, findings, account.rejected),
    ]
    report = _report(account, request, listing, provenance, (pool, evaluation), notes)
    for line in (f"{one_line(request.source)}: {report}", *notes):
        logger.info(line)
    return report


def _report(
    account: _Account,
    request: IngestRequest,
    listing: sources.Listing,
    provenance: Provenance,
    made: tuple[Path | None, Path | None],
    notes: list[str],
) -> IngestReport:
    """Count the results of an ingest; `made` are the new snapshots of the pool and of the evaluation set."""
    return IngestReport(
        seen=account.facts.seen,
        stored=len(account.evaluation if request.as_evaluation else account.pool),
        held_out=0 if request.as_evaluation else len(account.evaluation),
        already_present=account.facts.already_present,
        rejected=dict(sorted(Counter(str(finding.reason) for finding in account.rejected).items())),
        ignored=listing.ignored.counts.total(),
        labels=dict(sorted(Counter(image.label for image in account.images if image.label is not None).items())),
        unlabeled=sum(image.label is None for image in account.images),
        notes=tuple(notes),
        bytes_stored=sum(finding.length for finding in (*account.pool, *account.evaluation)),
        source_version=provenance.source_version,
        pool_snapshot=made[0],
        evaluation_snapshot=made[1],
        holds=(*account.used, *filter(None, made)) if request.one_run else (),
    )


@contextmanager
def hold_collection(collection: Path) -> Iterator[None]:
    """Lock a collection, so that two ingests cannot store one image twice; delete leftovers of killed ingests."""
    collection.mkdir(parents=True, exist_ok=True)
    handle = os.open(collection, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not try_lock(handle):
            raise IngestError(f"{collection}: another ingest is writing here; wait until it has ended")
        for folder in collection.glob(".ingest-*"):
            shutil.rmtree(folder, ignore_errors=True)
        for source in collection.glob("*/"):
            recover_dirs(source)
        yield
    finally:
        os.close(handle)


def _examine(listing: sources.Listing, request: IngestRequest) -> list[Finding]:
    workers = _workers_that_fit(request, 1 if listing.num_bytes < SMALL_SOURCE_BYTES else None)
    withdrawn = read_withdrawn(tombstone_folder(request.pool))
    look = partial(examine_batch, max_pixels=request.max_pixels, withdrawn=tuple(withdrawn.fingerprints))
    batches = map_shards(look, listing.batches, workers=workers, what="examine", unit="batches")
    refused = [Finding(item.uri, reason=item.reason, detail=item.detail) for item in listing.refusals]
    found = [*(_obey(finding, withdrawn) for batch in batches for finding in batch), *refused]
    return [replace(finding, uri=finding.uri.removeprefix(listing.root)) for finding in found]


def _obey(finding: Finding, withdrawn: Withdrawn) -> Finding:
    """Reject an image that was withdrawn, or is a near copy of one, with what its tombstone says."""
    if finding.reason == WITHDRAWN:  # a near copy; so far its detail is the fingerprint that it is near
        return replace(finding, detail=f"a near copy of an image that was {withdrawn.fingerprints[finding.detail]}")
    if finding.reason is None and (told := withdrawn.images.get(str(finding.image_id))):
        return replace(finding, reason=WITHDRAWN, detail=told)
    return finding


def _workers_that_fit(request: IngestRequest, workers: int | None) -> int | None:
    """Return the number of workers, limited by memory if images above the usual size limit are allowed."""
    workers = request.workers or workers
    if request.max_pixels <= MAX_PIXELS:
        return workers
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (fit := memory // (DECODED_BYTES * request.max_pixels)) == 0:
        given = f"max_pixels {request.max_pixels}: this machine's memory of {memory / 2**30:.1f} GiB has no room for it"
        raise IngestError(f"{given} ({DECODED_BYTES} bytes a pixel); give at most {memory // DECODED_BYTES}")
    return min(workers or len(os.sched_getaffinity(0)), fit)


def examine_batch(batch: sources.EntryBatch, max_pixels: int, withdrawn: tuple[str, ...] = ()) -> list[Finding]:
    """Decode every image of a batch; copy images that are expensive to read again to the batch's spool file.

    Args:
        batch: of the source.
        max_pixels: of an image.
        withdrawn: fingerprints; a near copy is rejected, with the fingerprint as its detail.
    """
    near = NearCopies(withdrawn)
    with ExitStack() as stack:
        spool = stack.enter_context(batch.spool.open("wb")) if batch.spool else None
        return [_examine_entry(entry, data, max_pixels, spool, near) for entry, data in sources.read_batch(batch)]


def _examine_entry(
    entry: sources.Entry, data: bytes | sources.Refusal, max_pixels: int, spool: BinaryIO | None, near: NearCopies
) -> Finding:
    finding = Finding(entry.uri, entry.folder, entry.label, notes=(entry.note,) if entry.note else ())
    if isinstance(data, sources.Refusal):
        return replace(finding, reason=data.reason, detail=data.detail)
    finding = replace(finding, image_id=hashlib.sha256(data).hexdigest(), length=len(data))
    try:
        loaded = decode_noted(data, max_pixels=max_pixels)
    except ImageError as error:
        remedy = TOO_MANY_PIXELS if error.reason == "too_many_pixels" else ""
        return replace(finding, reason=error.reason, detail=error.detail + remedy)
    if copied := near.find(loaded.image):
        return replace(finding, reason=WITHDRAWN, detail=copied)
    path, offset = entry.path, entry.offset
    if spool is not None:
        path, offset = spool.name, spool.tell()
        spool.write(data)
    image, notes = loaded.image, (*finding.notes, *loaded.notes)
    size = {"width": image.width, "height": image.height}
    return replace(finding, format=str(image.format), path=path, offset=offset, notes=notes, **size)


def _settle(findings: list[Finding], request: IngestRequest) -> _Account:
    """Classify each finding: rejected, copy, already present, pool, or evaluation set."""
    first: dict[str, Finding] = {}
    rejected, copies = [], []
    # Of equal bytes keep the test image, else the labeled one, else the first by name.
    for finding in sorted(findings, key=lambda finding: (finding.split != "test", finding.label is None)):
        if finding.reason is not None:
            rejected.append(finding)
        elif (original := first.setdefault(str(finding.image_id), finding)) is not finding:
            copies.append((original, finding))
            rejected.append(replace(finding, reason="exact_copy", detail=f"the same bytes as {original.uri}"))
    images = [first[image_id] for image_id in sorted(first)]
    evaluation = _with_splits([image for image in images if _is_held_out(image, request)])
    held = {image.image_id for image in evaluation}
    training = [image for image in images if image.image_id not in held]
    present, used = _cover(training, evaluation, request) if request.one_run else (_present(request), [])
    new_pool = [image for image in training if image.image_id not in present]
    new_evaluation = [image for image in evaluation if image.image_id not in present]
    stored = len(new_pool) + len(new_evaluation)
    facts = expectations.SnapshotFacts(request.name, len(findings), stored, already_present=len(first) - stored)
    seen = ((image, present.get(str(image.image_id), image.label)) for image in images)
    relabeled = [(image, label) for image, label in seen if label != image.label]
    return _Account(images, new_pool, new_evaluation, evaluation, rejected, copies, relabeled, used, facts)


def _is_held_out(image: Finding, request: IngestRequest) -> bool:
    held_out = request.holdout is not None and _place(str(image.image_id)) < request.holdout
    return request.as_evaluation or held_out


def _with_splits(evaluation: list[Finding]) -> list[Finding]:
    """Assign splits to evaluation images: those of the source, or by content if it lacks one of them."""
    labeled = [image for image in evaluation if image.label is not None]
    if {"train", "test"} <= {image.split for image in labeled or evaluation}:
        return [image if image.split else replace(image, split=_split_by_content(image)) for image in evaluation]
    return [replace(image, split=_split_by_content(image)) for image in evaluation]


def _split_by_content(image: Finding) -> str:
    """Assign half of the images to each split, by a part of the hash that the holdout does not use."""
    return "train" if int(str(image.image_id)[32:48], 16) % 2 == 0 else "test"


def _present(request: IngestRequest) -> dict[str, str | None]:
    """Return the ids, with labels, of images that earlier ingests of the source stored permanently.

    Images of two sources are stored in both: each source has its license, and can be used alone.
    """
    home = request.evaluation if request.as_evaluation else request.pool
    present: dict[str, str | None] = {}
    for collection in {home, request.evaluation} if request.holdout else {home}:
        for folder in _snapshots(collection / request.name):
            if not ((provenance := read_provenance(folder)) and provenance.one_run):
                present |= {row[0]: row[1] for row in _rows(folder)}
    return present


def _cover(
    training: list[Finding], evaluation: list[Finding], request: IngestRequest
) -> tuple[dict[str, str | None], list[Path]]:
    """Choose disjoint snapshots of the source that contain only its present images.

    Returns:
        The ids of the images in them, with labels; and the snapshots.
    """
    present: dict[str, str | None] = {}
    used: list[Path] = []
    for collection, images in ((request.pool, training), (request.evaluation, evaluation)):
        current = {_as_stored(image, request.license) for image in images}
        held = {folder: _rows(folder) for folder in _snapshots(collection / request.name)}
        for folder, rows in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            if rows <= current and not any(row[0] in present for row in rows):
                used.append(folder)
                present |= {row[0]: row[1] for row in rows}
    return present, used


def _snapshots(source: Path) -> list[Path]:
    return [path.parent for path in source.glob(f"[!.]*/{MANIFEST}")]


def _as_stored(image: Finding, license_: str) -> tuple[str, str | None, str | None, str, str]:
    """Return the manifest's fields of an image that do not follow from its bytes, with its id."""
    return str(image.image_id), image.label, image.split, image.uri, license_


def _rows(snapshot: Path) -> set[tuple[str, str | None, str | None, str, str]]:
    table = read_manifest(snapshot / MANIFEST)
    return set(zip(*(table[name].to_pylist() for name in STORED), strict=True))


def _place(image_id: str) -> float:
    """Return a number in [0, 1) by the image's hash, uniform over images and independent of its source."""
    return int(image_id[48:], 16) / 16**16


def snapshot_name(manifest: pa.Table) -> str:
    """Return the name of a snapshot with these rows: a digest of what does not follow from the images' bytes."""
    return _name_of(zip(*(manifest[name].to_pylist() for name in STORED), strict=True))


def _name_of(rows: Iterable[tuple[str, str | None, str | None, str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:12]


def _provenance(findings: Iterable[Finding], request: IngestRequest) -> Provenance:
    """Return the source's provenance; its version, if it gives none, is a digest of all names and bytes."""
    lines = sorted(f"{finding.uri} {finding.image_id or finding.reason}\n" for finding in findings)
    digest = "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
    return Provenance(
        source=request.source if "://" in request.source else os.path.realpath(request.source),
        source_version=request.source_version or digest,
        ingested_at=request.ingested_at or datetime.now(UTC).replace(microsecond=0),
        ingested_by=user_name(),
        one_run=request.one_run,
    )


def _write_snapshot(
    collection: Path, taken: list[Finding], account: _Account, request: IngestRequest, stack: ExitStack
) -> Path | None:
    """Write and validate one snapshot in a staging directory, which is renamed when `stack` exits without error."""
    if not taken:
        return None
    folder = collection / request.name / _name_of(_as_stored(finding, request.license) for finding in taken)
    staging = stack.enter_context(atomic_dir(folder))
    with ShardWriter(staging, request.shard_bytes) as shards:
        places = [
            shards.add(str(finding.image_id), EXTENSIONS[finding.format], _read_again(finding))
            for finding in track(taken, "store", len(taken))
        ]
    shard, offset, length = zip(*places, strict=True)
    columns = {
        **_columns(taken, "image_id", "format", "width", "height", "label", "split"),
        "shard": shard,
        "offset": offset,
        "length": length,
        "source": [request.name] * len(taken),
        "source_uri": [finding.uri for finding in taken],
        "license": [request.license] * len(taken),
    }
    write_manifest(pa.table(columns, schema=POOL_SCHEMA), staging / MANIFEST)
    _write_rejected(staging, account.rejected, request.name)
    title = f"{collection.name}-{request.name}-{folder.name}"
    validation = expectations.validate_snapshot(staging, account.facts, request.docs_folder / title)
    summary.write_summary(staging, title, account.facts, validation)
    return folder


def _columns(findings: list[Finding], *names: str) -> dict[str, list[Any]]:
    return {name: [getattr(finding, name) for finding in findings] for name in names}


def _read_again(finding: Finding) -> bytes:
    try:
        with Path(finding.path).open("rb") as file:
            file.seek(finding.offset)
            data = file.read(finding.length)
    except OSError as error:
        raise IngestError(f"{finding.uri}: {error.strerror or error} after it had been read; ingest again") from None
    if hashlib.sha256(data).hexdigest() != finding.image_id:
        raise IngestError(f"{finding.uri}: changed while it was read; ingest again when nothing writes to it")
    return data


def _write_rejected(folder: Path, rejected: list[Finding], source: str) -> None:
    ordered = sorted(rejected, key=lambda finding: (finding.uri, str(finding.reason)))
    columns = {
        **_columns(ordered, "reason", "detail", "image_id"),
        "source_uri": [finding.uri for finding in ordered],
        "source": [source] * len(ordered),
    }
    write_table(pa.table(columns, schema=QUARANTINE_SCHEMA), QUARANTINE_SCHEMA, folder / REJECTED)


def _no_images(source: str, findings: list[Finding], listing: sources.Listing) -> str:
    ignored = f"; {listing.ignored}" if listing.ignored.counts else ""
    if not findings:
        return f"{source}: its archives hold no images{ignored}"
    reasons = Counter(str(finding.reason) for finding in findings)
    found = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    example = findings[0]
    report_text = f"{source}: no image in {len(findings)} files ({found}); for example {example.uri}: {example.detail}"
    return report_text + ignored
