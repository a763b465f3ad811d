"""Remove the bytes of withdrawn images and what shows them, from DVC, S3, worktrees, caches and MLflow, and prove it.

Listings and manifests are kept, so that it stays known which data versions held an image; those versions cannot be
pulled whole any more. Pictures are removed whole from each run whose data held an image, because a sheet may show it.
Everything is found from what is kept, so that a purge that was cut short can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from components.core.git import git, try_git
from components.core.layout import RELATIVE, Layout
from components.core.text import some_of
from components.data.manifest import MANIFEST
from components.lineage.claims import mlflow_runs
from components.lineage.keeping import model_names
from components.lineage.lock_file import LOCK, Record, RecordError
from components.lineage.mlflow_files import BUCKET_VARIABLE, FOLDER, PROXIED
from components.lineage.removal import delete
from components.lineage.residue import Needles, S3Version, Searched, needle, search_disk, search_s3, with_base64
from components.lineage.runs import find_runs, worktrees
from components.lineage.stored import S3Store, Stored, object_path
from components.lineage.upkeep import Place, entry_outputs, places

PHOTOS, PAGES = (".jpg", ".jpeg"), (".html",)
PICTURES = (*PHOTOS, *PAGES, ".png")
PHOTO_IN_PAGE = re.compile(rb"data:image/jpeg;base64,([A-Za-z0-9+/=]{100,})")
VECTORS = (".npy", ".parquet")  # of the embeddings
CONFIGS = ("config.json", "weights/config.json")  # of an unfinished training, and of stored results
# Below these, files with bytes of an image are Pedigree's own copies; below others they are told, and left.
OWN = (str(RELATIVE.dvc_cache), *(str(RELATIVE.state / name) for name in ("cache", "checkpoints", "runs", "sample")))
OWN_IN_WORKTREE = tuple(str(path) for path in (RELATIVE.data, RELATIVE.reports, RELATIVE.models))
LOOKS = 2  # searches: the second one proves that what the first one found is gone

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass
class Doomed:
    """What holds or shows withdrawn images.

    Attributes:
        objects: DVC id of each file to remove, with its path in a data version.
        folders: DVC id of each folder with such files, with their paths in it.
        manifests: SHA-256 of the manifests with such images, by which trainings name their data.
        runs: ids of the runs whose data held an image.
        needles: what is searched for.
        unproved: images whose bytes were not at hand, so that nothing can be searched for.
        unread: folders whose listing or manifest is gone or damaged.
    """

    objects: dict[str, str] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    manifests: set[str] = field(default_factory=set)
    runs: list[str] = field(default_factory=list)
    needles: set[bytes] = field(default_factory=set)
    unproved: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def add(self, folder: str, files: Mapping[str, str], names: Iterable[str]) -> None:
        """Add files of a folder; `files` is its listing."""
        self.folders[folder] = sorted({*self.folders.get(folder, ()), *names})
        self.objects |= {files[name]: name for name in self.folders[folder]}


@dataclass
class Purged:
    """What a purge has done.

    Attributes:
        removed: number of removed things, by kind.
        lost: what an auditor cannot see any more.
        searched: how much was searched byte by byte.
        left: where bytes of the images were found and not removed, with why.
        notes: what could not be searched or removed.
    """

    removed: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    searched: Searched = field(default_factory=Searched)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Describe it for a person."""
        size = f"{self.searched.bytes / 2**20:,.1f} MiB in {self.searched.files:,} files and " \
               f"{self.searched.versions:,} object versions"  # fmt: skip
        found = f"found in {len(self.left)} places" if self.left else "nothing of the images is left"
        counts = ", ".join(f"{kind} {count:,}" for kind, count in self.removed.items() if count) or "nothing"
        return [
            f"removed: {counts}",
            f"searched byte by byte: {size}; {found}",
            *(f"left: {line}" for line in self.left),
            *(f"lost to an auditor: {line}" for line in self.lost),
            *self.notes,
        ]


def find_doomed(root: Path, images: Collection[str]) -> Doomed:
    """Find what holds or shows images in the DVC cache and on the remote, in all data versions of all branches.

    Raises:
        StorageError: the remote does not answer, or is not on S3.
    """
    found, there = Doomed(), _places(root)
    wanted, seen = pa.array(sorted(images), pa.string()), set[str]()
    listings = dict(_listings(there, found))
    for folder, files in listings.items():
        if MANIFEST in files and (table := _manifest(there, folder, files, found)) is not None:
            rows = table.filter(_names_any(table, wanted))
            if len(rows):
                found.add(folder, files, rows["shard"].unique().to_pylist())
                found.manifests.add(hashlib.sha256(_first(there, files[MANIFEST]) or b"").hexdigest())
                seen |= _take_needles(there, files, rows, found)
    found.unproved = set(images) - seen
    _add_pictures(root, listings, there, found)
    return found


def remove(root: Path, found: Doomed, images: Collection[str]) -> dict[str, int]:
    """Remove what was found, from S3 first; return the number of removed things by kind.

    Raises:
        StorageError: S3 or the disk refuses.
    """
    removed: Counter[str] = Counter()
    doomed = found.objects.keys() | found.folders.keys()
    for place in reversed(_places(root)):
        entries = {path: place.listing[path] for path, ids in entry_outputs([place]).items() if doomed & set(ids)}
        objects = {object_path(id_): place.objects[id_] for id_ in found.objects if id_ in place.objects}
        place.store.remove(entries)
        place.store.remove(objects)
        removed[f"objects on {place.name}"] += len(objects)
        removed[f"run-cache entries on {place.name}"] += len(entries)
    for path in _in_worktrees(root, found):
        removed["files in worktrees"] += _delete(path)
    for path in _in_caches(root, found, set(images)):
        removed["checkpoints and cache entries"] += _delete(path)
    return dict(removed)


def remove_mlflow_pictures(root: Path, client: Any, runs: Sequence[str]) -> tuple[int, list[str]]:
    """Remove the pictures and pages of these runs from MLflow, with all their versions on S3.

    Returns:
        Their number, and lines on runs whose files lie elsewhere.
    """
    names, bucket = model_names(root, find_runs(root)), os.environ.get(BUCKET_VARIABLE)
    found = [run for name in runs for run in mlflow_runs(client, names, f"tags.`pedigree.run` = '{name}'")]
    count, elsewhere = 0, []
    for run in found:
        scheme, _, path = run.info.artifact_uri.partition(":/")
        if scheme != PROXIED or not bucket:
            elsewhere.append(run.info.artifact_uri)
            continue
        store = S3Store(f"s3://{bucket}/{FOLDER}/{path.strip('/')}/")
        pictures = {name: item for name, item in store.listing(("",)).items() if name.lower().endswith(PICTURES)}
        store.remove(pictures)
        count += len(pictures)
    told = f"pictures of {len(elsewhere)} MLflow runs are not in the models bucket: remove them in {some_of(elsewhere)}"
    return count, [told] if elsewhere else []


def prove(root: Path, search: Iterable[bytes], done: Purged) -> None:
    """Search everything byte by byte, remove Pedigree's own copies that are found, and tell what is left.

    Raises:
        StorageError: S3 does not answer.
    """
    wanted, present = Needles(with_base64(sorted(set(search)))), _present(root)
    remote, models = Record(root).remote_url(), os.environ.get(BUCKET_VARIABLE)
    for look in range(LOOKS):
        done.searched = Searched()
        files = search_disk(_roots(root), wanted, done.searched)
        versions = [
            version
            for address in filter(None, (remote, f"s3://{models}/{FOLDER}" if models else None))
            for version in search_s3(address, wanted, done.searched)
        ]
        own = [path for path in files if _is_own(root, path) and not path.as_posix().endswith(present)]
        ours = [each for each in versions if _is_ours(each, str(remote)) and not each.key.endswith(present)]
        if look or not (own or ours):
            done.left = [_told(root, path) for path in files] + [f"{each}: not removed" for each in versions]
            break
        for path in own:
            delete(path)
        for version in ours:
            _remove_version(version)
        done.removed["copies found by the search"] = len(own) + len(ours)
    if done.searched.unread:
        done.notes.append(f"{done.searched.unread} files of other users were not searched")


def _present(root: Path) -> tuple[str, ...]:
    """Return the object paths of the checkout's present snapshots, which never hold an image and are never removed."""
    ids, there = Record(root).tracked(str(RELATIVE.data)).values(), _places(root)
    files = [item["md5"] for id_ in ids for item in json.loads(_first(there, id_) or b"[]")]
    return tuple(object_path(id_) for id_ in (*ids, *files))


def _places(root: Path) -> list[Place]:
    return [place for place in places(root, Layout(root).dvc_cache) if place]


def _first(there: Sequence[Place], id_: str) -> bytes | None:
    """Return an object's bytes from the first place that has it."""
    return next((data for place in there if (data := place.store.read(object_path(id_))) is not None), None)


def _listings(there: Sequence[Place], found: Doomed) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each folder in the cache or on the remote with its files: path -> DVC id."""
    for id_ in sorted({id_ for place in there for id_ in place.objects if id_.endswith(".dir")}):
        try:
            yield id_, {item["relpath"]: item["md5"] for item in json.loads(_first(there, id_) or b"")}
        except (ValueError, KeyError, TypeError):
            found.unread.append(id_)


def _manifest(there: Sequence[Place], folder: str, files: Mapping[str, str], found: Doomed) -> pa.Table | None:
    try:
        return pq.read_table(pa.BufferReader(_first(there, files[MANIFEST]) or b""))
    except pa.ArrowInvalid:
        found.unread.append(folder)
        return None


def _names_any(table: pa.Table, wanted: pa.Array) -> Any:
    """Return which rows are of these images, or of what was made from them by blurring faces."""
    names = [name for name in ("image_id", "derived_from") if name in table.column_names]
    first, *others = [pc.is_in(table[name], value_set=wanted) for name in names]
    return pc.or_(first, others[0]) if others else first


def _take_needles(there: Sequence[Place], files: Mapping[str, str], rows: pa.Table, found: Doomed) -> set[str]:
    """Add what is searched for of the images; return the ids of those whose bytes are here."""
    seen = set()
    for shard in rows["shard"].unique().to_pylist():
        data = _first(there, files[shard])
        if data is None:
            continue
        for row in rows.filter(pc.equal(rows["shard"], shard)).to_pylist():
            start, end = row["offset"], row["offset"] + row["length"]
            found.needles.add(needle(data[start:end], (data[:start], data[end:])))
            seen.add(row.get("derived_from") or row["image_id"])
    return seen


def _add_pictures(root: Path, listings: Mapping[str, dict[str, str]], there: Sequence[Place], found: Doomed) -> None:
    """Add pictures, pages and embeddings that stages made from data with the images, in any commit."""
    held, commits = set(found.folders), set[str]()
    for commit in git(root, "log", "--all", "--format=%H", "--", LOCK).split():
        record = Record(root, commit)
        try:
            stages = record.stages()
        except RecordError:
            continue
        outs = {out["path"]: str(out.get("md5")) for stage in stages.values() for out in stage.get("outs") or ()}
        data = {**record.tracked(str(RELATIVE.data)), **outs}
        holding = {path for path, id_ in data.items() if id_ in held}
        for stage in stages.values():
            if any(PurePosixPath(dep["path"]) in (PurePosixPath(path), *PurePosixPath(path).parents)
                   for dep in stage.get("deps") or () for path in holding):  # fmt: skip
                commits.add(commit)
                _add_outputs(stage.get("outs") or (), listings, found)
    for id_, name in found.objects.items():
        if name.lower().endswith(PHOTOS + PAGES):
            found.needles |= {needle(data) for data in _photos(name, _first(there, id_) or b"")}
    found.runs = sorted(run.id for run in find_runs(root) if any(commit.sha in commits for commit in run.commits))


def _add_outputs(outs: Iterable[Mapping[str, Any]], listings: Mapping[str, dict[str, str]], found: Doomed) -> None:
    for out in outs:
        path, id_ = str(out["path"]), str(out.get("md5"))
        endings = VECTORS if path == str(RELATIVE.embeddings) else PICTURES
        if id_ in listings and (path == str(RELATIVE.embeddings) or path.startswith(f"{RELATIVE.reports}/")):
            found.add(id_, listings[id_], [name for name in listings[id_] if name.lower().endswith(endings)])
        elif path.startswith(f"{RELATIVE.reports}/") and path.lower().endswith(PICTURES):
            found.objects[id_] = path


def _photos(name: str, data: bytes) -> list[bytes]:
    """Return a photo, or those that a page shows; other pages may have its charts and texts too."""
    found = [b64decode(text) for text in PHOTO_IN_PAGE.findall(data)] if name.lower().endswith(PAGES) else [data]
    return [photo for photo in found if photo]


def _in_worktrees(root: Path, found: Doomed) -> Iterator[Path]:
    for tree in worktrees(root):
        record = Record(tree.folder)
        at = record.tracked(str(RELATIVE.data))
        with suppress(RecordError):  # no stage has run here
            at |= {out["path"]: str(out.get("md5")) for s in record.stages().values() for out in s.get("outs") or ()}
        for path, id_ in at.items():
            if id_ in found.objects:
                yield tree.folder / path
            yield from (tree.folder / path / name for name in found.folders.get(id_, ()))


def _in_caches(root: Path, found: Doomed, images: set[str]) -> Iterator[Path]:
    """Yield checkpoints and results of trainings on this data, fetched shards, and cached embeddings and tokens."""
    layout = Layout(root)
    for folder in (*layout.checkpoints().glob("[!.]*"), *layout.trained.glob("[!.]*")):
        if any(_dataset(folder / name) in found.manifests for name in CONFIGS):
            yield folder
    yield from (path for path in layout.cache("shards").glob("[!.]*") if path.is_file())
    yield from _cached_embeddings(layout.cache("embeddings"), images)
    # Of evaluation sets; they do not name their images.
    yield from (path for path in layout.cache("tokens").glob("[!.]*") if path.is_dir())


def _cached_embeddings(folder: Path, images: set[str]) -> Iterator[Path]:
    """Yield the results of shards with the images, which the scores name, and of shards without scores."""
    scores = sorted(folder.glob("scores/*/*.parquet"))
    clean = {path.stem for path in scores if images.isdisjoint(_scored(path, images))}
    yield from (path for path in (*scores, *folder.glob("*/*.npy")) if path.stem not in clean)


def _scored(path: Path, images: set[str]) -> set[str]:
    try:
        return set(pq.read_table(path, columns=["image_id"])["image_id"].to_pylist())
    except (OSError, pa.ArrowInvalid):
        return images  # damaged, so it may be any


def _dataset(path: Path) -> str | None:
    try:
        values = json.loads(path.read_text())
        return values.get("dataset_sha256") or values.get("provenance", {}).get("dataset_sha256")
    except (OSError, ValueError, AttributeError):
        return None


def _delete(path: Path) -> int:
    there = path.exists()
    delete(path)
    return int(there)


def _roots(root: Path) -> list[Path]:
    """Return the checkout, and the worktrees and the state folder that lie outside of it."""
    others = [tree.folder for tree in worktrees(root)] + [Layout(root).state.resolve()]
    return [root, *(path for path in others if path.is_dir() and root.resolve() not in (path, *path.parents))]


def _is_own(root: Path, path: Path) -> bool:
    for tree in [root, *(tree.folder for tree in worktrees(root))]:
        for name in (*OWN, *OWN_IN_WORKTREE):
            if tree / name in path.parents:
                return try_git(tree, "ls-files", "--error-unmatch", "--", str(path)) is None
    return False


def _is_ours(version: S3Version, remote: str) -> bool:
    return str(version).startswith(f"{remote}/") or version.key.lower().endswith(PICTURES)


def _remove_version(version: S3Version) -> None:
    store = S3Store(f"s3://{version.bucket}")
    store.remove({version.key: Stored(0, 0.0, versions=(version.version,))})


def _told(root: Path, path: Path) -> str:
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return f"{shown}: not a copy that Pedigree made, so it was not removed"
