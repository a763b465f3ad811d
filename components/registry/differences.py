"""What one version differs from another in: parameters and code by git, images by their manifests on the remote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from components.core.errors import PedigreeError
from components.data.manifest import MANIFEST
from components.lineage.changes import changed_files
from components.lineage.code import list_of
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record, RecordError, find_record
from components.lineage.provenance import CURATED, Tag, data_versions
from components.registry.making import parameters, sources, stages_of

COLUMNS = ["image_id", "source", "license"]
DEFAULT = "not given"  # of a parameter that has the value of its config model

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class Images:
    """Images of one source and license: in the other's training set, in this one's, and what changed between them."""

    source: str
    license: str
    before: int
    added: int
    removed: int
    now: int


@dataclass(frozen=True)
class Differences:
    """What a version differs from another in; of a part that could not be compared, the sentence that says why.

    Attributes:
        parameters: name, value there, value here.
        code: file, how it changed, stages that load it.
        images: by source and license, those with no change too.
    """

    parameters: list[tuple[str, str, str]] | str
    code: list[tuple[str, str, str]] | str
    images: list[Images] | str


@dataclass(frozen=True)
class Side:
    """One of the two versions.

    Attributes:
        tags: of the version.
        record: its commit or workspace; None: not in this clone.
        manifest: of its training set, if it is at hand; None takes it from the remote.
    """

    tags: Mapping[str, str]
    record: Record | None
    manifest: pa.Table | None = None

    @classmethod
    def registered(cls, tags: Mapping[str, str], root: Path) -> Side:
        """A version by its tags, as far as a clone of the repository knows it."""
        commit = tags.get(Tag.COMMIT)
        return cls(tags, find_record(root, commit, tags.get(Tag.LOCK_SHA256)) if commit else None)

    @property
    def weights(self) -> str:
        """Path of its weights in its run."""
        return self.tags.get(Tag.WEIGHTS_PATH, "")

    @property
    def images_id(self) -> str | None:
        """DVC id of its training set."""
        return next((version.dvc for version in data_versions(self.tags, Tag.CURATED)), None)

    def missing(self) -> str:
        """Says that its commit is not here."""
        commit, branch = self.tags.get(Tag.COMMIT, "(none)")[:12], self.tags.get(Tag.BRANCH, "(none)")
        return f"Not compared: commit {commit} with its dvc.lock is not in this clone; fetch the branch {branch}."

    def images(self, root: Path) -> pa.Table:
        """Columns image_id, source and license of its training set.

        Raises:
            PedigreeError: it is out of reach.
        """
        if self.manifest is not None:
            return self.manifest.select(COLUMNS)
        if self.images_id is None:
            raise RecordError("the version names no training set")
        remote = Remote((self.record or Record(root)).remote_url())
        files = remote.listing(self.images_id)
        if MANIFEST not in files:
            raise RecordError(f"{remote.address(self.images_id)}: has no {MANIFEST}")
        manifest = remote.file(root / CURATED, MANIFEST, files[MANIFEST])
        return pq.read_table(pa.BufferReader(manifest), columns=COLUMNS)


def differences(here: Side, there: Side, root: Path) -> Differences:
    """Compare a version with another one.

    Args:
        here: the version.
        there: the other one.
        root: a clone of the repository whose commits made them.
    """
    images = _images(here, there, root)
    now, before = here.record, there.record
    if now is None or before is None:
        why = (there if before is None else here).missing()
        return Differences(why, why, images)
    return Differences(_parameters(now, before, here, there), _code(now, before, here.weights), images)


def _parameters(now: Record, before: Record, here: Side, there: Side) -> list[tuple[str, str, str]]:
    new, old = parameters(now, here.weights), parameters(before, there.weights)
    names = [name for name in {**new, **old} if new.get(name, DEFAULT) != old.get(name, DEFAULT)]
    return [(name, str(old.get(name, DEFAULT)), str(new.get(name, DEFAULT))) for name in names]


def _code(now: Record, before: Record, weights: str) -> list[tuple[str, str, str]] | str:
    """The files that the stages of this version load and that are not as they were, as parsed."""
    found: dict[str, tuple[str, list[str]]] = {}
    for stage in stages_of(now, weights):
        path = list_of(stage)
        for record in (before, now):
            if record.read(path) is None:
                where = f"commit {record.revision[:12]}" if record.revision else "the workspace"
                return f"Not compared: {where} has no {path}, which names the code of a stage."
        for file, how in changed_files(path, before, now).items():
            found.setdefault(file, (how, []))[1].append(stage)
    return [(file, how, ", ".join(stages)) for file, (how, stages) in sorted(found.items())]


def _images(here: Side, there: Side, root: Path) -> list[Images] | str:
    try:
        now = here.images(root)
        same = here.images_id is not None and here.images_id == there.images_id
        before = now if same else there.images(root)
    except (PedigreeError, ValueError, KeyError) as error:
        return f"Not compared: {error}."
    counts = [_counts(before), _counts(_without(now, before)), _counts(_without(before, now)), _counts(now)]
    keys = sorted({key for found in counts for key in found})
    return [Images(*key, *(found.get(key, 0) for found in counts)) for key in keys]


def _without(images: pa.Table, others: pa.Table) -> pa.Table:
    return images.filter(pc.invert(pc.is_in(images["image_id"], value_set=others["image_id"].combine_chunks())))


def _counts(images: pa.Table) -> dict[tuple[str, str], int]:
    return {(source, license_): count for source, license_, count in sources(images)}
