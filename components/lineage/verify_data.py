"""Verify the DVC objects of a run from their bytes: listings, files, and each image of each shard."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.core.storage import MissingInStorageError
from components.core.text import some_of
from components.data.manifest import MANIFEST
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record
from components.lineage.provenance import CURATED, EVALUATION, POOL
from components.lineage.verify_objects import CHUNK, NOT_THERE, Job, Objects, hashes, in_parallel

FOLDER = ".dir"  # suffix of the id of a folder's listing
COLUMNS = ["image_id", "shard", "offset", "length"]
Rows = Mapping[int, tuple[str, int]]  # by offset in the shard: image id, length


@dataclass
class DataCheck:
    """What is wrong with a run's data at once, and the objects that are still to be read.

    Attributes:
        files: address of each file, by its path in the workspace.
    """

    objects: Objects
    record: Record
    files: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def plan(self) -> DataCheck:
        """Read the listings and manifests, and plan a job for each object."""
        remote = self.objects.remote(self.record)
        found = sorted(outputs(self.record).items())
        listings = in_parallel(lambda item: self._listing(remote, *item), found)
        for (path, id_), listing in zip(found, listings, strict=True):
            if listing is not None:
                self._plan_files(remote, path, listing)
            elif not id_.endswith(FOLDER):
                self._plan_file(remote.address(id_), path, id_)
        return self

    def weights_job(self, path: str, sha256: str) -> Job | None:
        """Return the job that compares weights with their registered SHA-256; None if they are in no listing."""
        address = self.files.get(path)
        return Job(address, partial(self._check_sha256, address, path, sha256), f"{path} {sha256}") if address else None

    def _listing(self, remote: Remote, path: str, id_: str) -> dict[str, str] | None:
        """Return the files of a folder; None for a file, or a listing that cannot be read."""
        if not id_.endswith(FOLDER):
            return None
        address = remote.address(id_)
        try:
            data = self.objects.read(address)
            if _md5(data) != id_.removesuffix(FOLDER):
                self.faults.append(f"{address}: the listing of {path} is not the one that dvc.lock or .dvc records")
            return {item["relpath"]: item["md5"] for item in json.loads(data)}
        except MissingInStorageError:
            self.faults.append(f"{address}: {NOT_THERE} (listing of {path})")
        except (ValueError, TypeError, KeyError):
            self.faults.append(f"{address}: not a listing of DVC ({path})")
        return None

    def _plan_files(self, remote: Remote, folder: str, listing: Mapping[str, str]) -> None:
        of_shards = self._manifest(remote, folder, listing)
        for name, id_ in sorted(listing.items()):
            if of_shards is not None and name in of_shards:
                self._plan_shard(remote.address(id_), f"{folder}/{name}", id_, of_shards[name])
            else:
                self._plan_file(remote.address(id_), f"{folder}/{name}", id_)
        for name in sorted(set(of_shards or ()) - listing.keys()):
            self.faults.append(f"{folder}/{MANIFEST}: names the shard {name}, which the folder lacks")

    def _plan_file(self, address: str, path: str, id_: str) -> None:
        self.files[path] = address
        self.jobs.append(Job(address, partial(self._check_file, address, path, id_), path))

    def _plan_shard(self, address: str, path: str, id_: str, rows: Rows) -> None:
        size = max((offset + length for offset, (_, length) in rows.items()), default=0)
        self.jobs.append(Job(address, partial(self._check_shard, address, path, id_, rows), path, True, size))

    def _check_file(self, address: str, path: str, id_: str) -> list[str]:
        found = self.objects.scan(address, "hashes", hashes)
        return [] if found["md5"] == id_ else [f"{address}: not the bytes of {path} that were recorded"]

    def _check_sha256(self, address: str, path: str, stated: str) -> list[str]:
        found = self.objects.sha256(address)
        return [] if found == stated else [f"{address}: {path} has the SHA-256 {found}, not the registered {stated}"]

    def _check_shard(self, address: str, path: str, id_: str, rows: Rows) -> list[str]:
        stated = _md5(json.dumps(sorted(rows.items())).encode())
        found = self.objects.scan(address, f"shard {stated}", partial(read_shard, rows=rows))
        bytes_ = [] if found["md5"] == id_ else [f"{address}: not the bytes of {path} that were recorded"]
        return [*bytes_, *(f"{address}: {path}: {line}" for line in found["faults"])]

    def _manifest(self, remote: Remote, folder: str, listing: Mapping[str, str]) -> dict[str, dict[int, Any]] | None:
        """Return the rows of a data folder's manifest by shard; None without one, or if it is not as recorded."""
        if not _holds_images(folder) or MANIFEST not in listing:
            return None
        try:
            data = self.objects.read(remote.address(listing[MANIFEST]))
            table = pq.read_table(pa.BufferReader(data), columns=COLUMNS) if _md5(data) == listing[MANIFEST] else None
        except (MissingInStorageError, pa.ArrowInvalid, OSError):
            return None  # the job of the file says so
        rows: dict[str, dict[int, Any]] = {}
        for row in table.to_pylist() if table is not None else ():
            rows.setdefault(row["shard"], {})[row["offset"]] = (row["image_id"], row["length"])
        return rows if table is not None else None


def outputs(record: Record) -> dict[str, str]:
    """Return the DVC id of each output and snapshot of a record by path, without those that are in git."""
    outs = (out for stage in record.stages().values() for out in stage.get("outs", []))
    found = {out["path"]: out["md5"] for out in outs if record.read(out["path"]) is None}
    return found | record.tracked(POOL) | record.tracked(EVALUATION)


def read_shard(body: BinaryIO, rows: Rows) -> dict[str, Any]:
    """Return the MD5 of a shard, and where its members are not the images of its manifest's rows."""
    stream, faults, left = _Hashed(body), [], dict(rows)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]  # a stream is only read
            for member, sha256 in _members(archive):
                image_id, length = left.pop(member.offset_data, ("", 0))
                faults += _differing(member, sha256, image_id, length)
    except tarfile.TarError as error:
        faults.append(f"not a readable tar: {error}")
    while stream.read(CHUNK):
        pass
    faults += [f"no image at byte {offset}, where the manifest has {id_}" for offset, (id_, _) in left.items()]
    return {"md5": stream.md5.hexdigest(), "faults": faults if len(faults) <= 3 else [some_of(faults, 3)]}


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    for member in archive:
        file = archive.extractfile(member)
        yield member, hashlib.sha256(file.read()).hexdigest() if file else ""


def _differing(member: tarfile.TarInfo, sha256: str, image_id: str, length: int) -> list[str]:
    if not image_id:
        return [f"{member.name} is in no row of the manifest"]
    if member.size != length:
        return [f"{member.name} has {member.size} bytes, in the manifest {length}"]
    if sha256 != image_id:
        return [f"image {image_id} of the manifest has bytes of SHA-256 {sha256} ({member.name})"]
    return []


class _Hashed:
    """A stream whose MD5 is taken while it is read."""

    def __init__(self, body: BinaryIO) -> None:
        self._body = body
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, size: int) -> bytes:
        data = self._body.read(size)
        self.md5.update(data)
        return data


def _holds_images(folder: str) -> bool:
    return folder == CURATED or folder.startswith((f"{POOL}/", f"{EVALUATION}/"))


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
