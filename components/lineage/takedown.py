"""Withdraw images: an audit event, a tombstone, data versions without them, and flags on the models that learned them.

The intent is written to a file first, and deleted at the end. Every step can be repeated and ends in the same state, so
that a takedown that was cut short anywhere is finished by doing all steps again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from pydantic import Field

from components.core.config import Config, validate
from components.core.git import git
from components.core.layout import RELATIVE
from components.core.mlflow_client import reported
from components.core.references import ModelReference
from components.core.storage import write_json
from components.data.manifest import MANIFEST, read_manifest, snapshot_manifests
from components.data.provenance import provenance_file
from components.data.rebuild import rebuild
from components.data.shards import ShardReader
from components.data.tombstones import Tombstone, read_tombstones, tombstone_folder
from components.lineage.audit_chain import TAKEDOWN
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from components.lineage.ledger import Ledger
from components.lineage.lock_file import Record
from components.lineage.provenance import Tag

NOTES = RELATIVE.state / "takedowns"  # intents of takedowns that are not finished
COLLECTIONS = (RELATIVE.pool, RELATIVE.evaluation)
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's answers about a deleted version
NAMED_IDS = 100  # image ids in an audit event; the tombstone has all

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


class Takedown(Config):
    """The intent of a takedown.

    Attributes:
        id: by images and reason, so that the same takedown asked for twice is one.
        asked: what was asked for, such as `source crawl`.
        by: who asked.
        actor_from: how that is known.
        models: registered versions that may have learned the images, with why.
        snapshots: of the checkout that hold images, to the folders that replace them: None where no image is left; an
            empty text as long as it is not known.
        near_copies: near copies are refused too, by `fingerprints`.
        purge: the bytes are removed too.
        search: what the proof of a purge searches for, hexadecimal; see `purge.py`.
        retrain: start a retraining.
    """

    id: str
    reason: str
    asked: str
    at: datetime
    by: str
    actor_from: str
    images: tuple[str, ...]
    fingerprints: tuple[str, ...] = ()
    models: dict[str, str] = Field(default_factory=dict)
    snapshots: dict[str, str | None] = Field(default_factory=dict)
    near_copies: bool = False
    purge: bool = False
    search: tuple[str, ...] = ()
    retrain: bool = True

    def note(self, root: Path) -> Path:
        """Return the path of the intent's file."""
        return root / NOTES / f"{self.id}.json"

    def save(self, root: Path) -> None:
        """Write the intent, before anything is done."""
        write_json(self.note(root), self.model_dump(mode="json"))

    def forget(self, root: Path) -> None:
        """Delete the intent, once all is done."""
        self.note(root).unlink(missing_ok=True)

    @property
    def tombstone(self) -> Tombstone:
        """What is kept of it in git."""
        return Tombstone(
            takedown=self.id, reason=self.reason, withdrawn_at=self.at, withdrawn_by=self.by, images=self.images,
            fingerprints=self.fingerprints,
        )  # fmt: skip


def takedown_id(images: Iterable[str], reason: str) -> str:
    """Return the id of the takedown of these images for this reason."""
    return "w-" + hashlib.sha256("\n".join([*sorted(images), reason]).encode()).hexdigest()[:12]


def unfinished(root: Path) -> list[Takedown]:
    """Return the takedowns that were begun and not finished, by id.

    Raises:
        ConfigError: an intent's file was changed by hand.
    """
    paths = sorted((root / NOTES).glob("*.json"))
    return [validate(Takedown, json.loads(path.read_text()), str(path)) for path in paths]


def image_bytes(snapshot: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return the encoded bytes of these images, as far as a snapshot on disk holds them, by id."""
    table, reader = read_manifest(snapshot / MANIFEST), ShardReader(snapshot)
    rows = table.filter(pc.is_in(table["image_id"], value_set=pa.array(sorted(wanted), pa.string()))).to_pylist()
    return {row["image_id"]: reader.read(row["shard"], row["offset"], row["length"]) for row in rows}


def snapshots_with(root: Path, wanted: Iterable[str]) -> dict[str, int]:
    """Return the snapshots of the checkout, tracked or not, that hold any of these images, with their number."""
    ids, found = pa.array(sorted(wanted), pa.string()), {}
    for path in (path for folder in COLLECTIONS for path in snapshot_manifests(root / folder)):
        count = pc.sum(pc.is_in(read_manifest(path)["image_id"], value_set=ids)).as_py()
        if count:
            found[path.parent.relative_to(root).as_posix()] = count
    return found


def record(takedown: Takedown, log: AuditLog, snapshots: Mapping[str, str]) -> None:
    """Append the event of a takedown, unless the log has it.

    Args:
        takedown: the intent.
        log: the audit log.
        snapshots: DVC ids of the snapshots of the checkout that hold images.

    Raises:
        RecordError, StorageError: the log is broken or does not answer; nothing else may be done then.
    """
    if _recorded(log, PLATFORM, takedown.id, takedown.id):
        return
    details = {
        "reason": takedown.reason,
        "asked": takedown.asked,
        "actor_from": takedown.actor_from,
        "images": len(takedown.images),
        "image_ids": list(takedown.images[:NAMED_IDS]),
        "images_sha256": hashlib.sha256("\n".join(takedown.images).encode()).hexdigest(),
        "near_copies": takedown.near_copies,
        "purge": takedown.purge,
        "snapshots": dict(snapshots),
        "models": dict(takedown.models),
    }
    log.append(Event(PLATFORM, TAKEDOWN, takedown.id, takedown.by, details))


def bury(root: Path, takedown: Takedown) -> Path:
    """Write the tombstone, unless it is there, and return its path; from then on every ingest refuses the images."""
    folder = root / tombstone_folder(RELATIVE.pool)
    there = {stone.takedown: stone for stone in read_tombstones(folder)}.get(takedown.id)
    if there and set(takedown.fingerprints) <= set(there.fingerprints):
        return folder / f"{takedown.id}.json"
    return takedown.tombstone.write(folder)


def replace_snapshots(root: Path, takedown: Takedown) -> Takedown:
    """Replace each snapshot of the checkout that holds images by one without them, tracked by DVC and pushed.

    Returns:
        The intent, with the new snapshots, which is saved before an old one is removed.

    Raises:
        LedgerError: DVC failed, or the remote does not answer.
        DatasetError: a snapshot is damaged.
    """
    ledger, why = Ledger(root), f"{takedown.id}: {takedown.reason}"
    for old, known in takedown.snapshots.items():
        if known == "":
            made = rebuild(root / old, takedown.images, why, root / RELATIVE.data_docs)
            new = None if made is None else made.relative_to(root).as_posix()
            takedown = takedown.model_copy(update={"snapshots": {**takedown.snapshots, old: new}})
            takedown.save(root)
        if new := takedown.snapshots[old]:
            ledger.track(Path(new))
        _remove(root, ledger, old)
    return takedown


def commit(root: Path, takedown: Takedown) -> str:
    """Commit the tombstone and the replaced snapshots to the checkout's branch, and nothing else; return the commit.

    Raises:
        GitError: git refused, for example in the middle of a merge.
    """
    paths = [bury(root, takedown).relative_to(root)]
    for snapshot in {*takedown.snapshots, *takedown.snapshots.values()} - {None, ""}:
        folder = Path(str(snapshot))
        paths += [tracked_by(folder), provenance_file(folder)]
    there = [path.as_posix() for path in paths if (root / path).exists()]
    known = set(git(root, "ls-files", "-z", "--", *map(str, paths)).split("\0")) - {""}
    git(root, "add", "--force", "--", *there)
    if git(root, "status", "--porcelain", "--", *map(str, paths)):
        message = f"Withdraw {len(takedown.images):,} images ({takedown.id})"
        git(root, "commit", "--quiet", "--no-verify", "--only", "--message", message, "--", *{*there, *known})
    return git(root, "rev-parse", "HEAD")


def flag(takedown: Takedown, client: Any, log: AuditLog) -> list[str]:
    """Record the takedown with each model that may have learned the images, and tag it; then its gate fails.

    Returns:
        A line for each version that MLflow does not have any more.

    Raises:
        TrackingError: MLflow does not answer.
        RecordError, StorageError: as of `record`.
    """
    from mlflow.exceptions import MlflowException

    gone = []
    for address, relation in takedown.models.items():
        reference = ModelReference.parse(address)
        assert reference is not None
        if not _recorded(log, reference.model, takedown.id, address):
            details = {"takedown": takedown.id, "reason": takedown.reason, "relation": relation}
            log.append(Event(reference.model, TAKEDOWN, address, takedown.by, details))
        with reported():
            try:
                told = f"{takedown.id}: {takedown.reason}"
                client.set_model_version_tag(reference.name, reference.version, Tag.TAKEDOWN, told)
            except MlflowException as error:
                if error.error_code not in NOT_THERE:
                    raise
                gone.append(f"{address}: not flagged, MLflow does not have it any more")
    return gone


def tracked_by(snapshot: Path) -> Path:
    """Return the `.dvc` file of a snapshot."""
    return snapshot.with_name(f"{snapshot.name}.dvc")


def dvc_ids(root: Path) -> dict[str, str]:
    """Return the DVC id of each snapshot of the checkout, by path."""
    return {path: id_ for folder in COLLECTIONS for path, id_ in Record(root).tracked(str(folder)).items()}


def _recorded(log: AuditLog, chain: str, takedown: str, subject: str) -> bool:
    found = (entry for entry in log.read(chain) if entry.action == TAKEDOWN and entry.subject == subject)
    return any(takedown in (entry.subject, entry.details.get("takedown")) for entry in found)


def _remove(root: Path, ledger: Ledger, snapshot: str) -> None:
    """Untrack a snapshot, and delete its folder and provenance; its objects are kept."""
    folder = root / snapshot
    if tracked_by(folder).exists():
        ledger.untrack(tracked_by(folder))
    if folder.exists():  # not tracked by DVC, or a removal was cut short
        shutil.rmtree(folder)
    provenance_file(folder).unlink(missing_ok=True)
