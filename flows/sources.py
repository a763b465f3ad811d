"""Sources of a checkout with their snapshots, and the selection for a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from slugify import slugify

from components.core.config import ConfigError
from components.core.layout import RELATIVE
from components.data.provenance import Provenance, read_provenance

COLLECTIONS = POOL, EVALUATION = (str(RELATIVE.pool), str(RELATIVE.evaluation))
SAMPLE = "sample"  # the source that `pedigree run` creates if there is no other
MAX_NAME = 63


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that DVC tracks."""

    collection: str
    source: str
    folder: Path  # in the checkout; missing if its data was not fetched
    provenance: Provenance | None

    @property
    def entry(self) -> str:
        """Name as SOURCE/SNAPSHOT."""
        return f"{self.source}/{self.folder.name}"

    @property
    def tracked_by(self) -> Path:
        """Its `.dvc` file."""
        return self.folder.with_name(f"{self.folder.name}.dvc")

    @property
    def num_bytes(self) -> int:
        """Size as recorded by DVC."""
        outs = (yaml.safe_load(self.tracked_by.read_text()) or {}).get("outs", ())
        return sum(out.get("size", 0) for out in outs)

    @property
    def one_run(self) -> bool:
        """Whether it was ingested for one run; other runs use it only if they name it."""
        return self.provenance is not None and self.provenance.one_run


def snapshots(checkout: Path, entries: Sequence[str] | None = None) -> list[Snapshot]:
    """Return all snapshots, or those of `entries`, in order."""
    files = [(name, path) for name in COLLECTIONS for path in sorted((checkout / name).glob("*/*.dvc"))]
    found = [(name, path.parent.name, path.with_suffix("")) for name, path in files]
    return [
        Snapshot(collection, source, folder, read_provenance(folder))
        for collection, source, folder in found
        if entries is None or f"{source}/{folder.name}" in entries
    ]


def any_to_stay(checkout: Path) -> bool:
    """Return whether the pool has a permanent source."""
    return any(one.collection == POOL and not one.one_run for one in snapshots(checkout))


def choose(checkout: Path, requested: Sequence[str] | None) -> list[str]:
    """Select the snapshots of a run, as SOURCE/SNAPSHOT.

    Args:
        checkout: Pedigree's folder.
        requested: names of sources, or SOURCE/SNAPSHOT. None: all permanent sources; the sample only if there is no
            other.

    Returns:
        The snapshots, and those of evaluation sets without a source in the pool, on which every run is evaluated.

    Raises:
        ConfigError: an unknown source or snapshot, or an empty selection.
    """
    found = snapshots(checkout)
    pool = {one.source for one in found if one.collection == POOL}
    stay = [one for one in found if not one.one_run]
    names = {one.source for one in stay if one.collection == POOL}
    if requested is None:
        if not names:
            raise ConfigError(_empty(pool))
        requested = sorted(names - {SAMPLE} or names)
    chosen = {one.entry for one in stay if one.source not in names}
    for name in requested:
        taken = [one.entry for one in (found if "/" in name else stay) if name in {one.source, one.entry}]
        if not taken or (name not in names and "/" not in name):
            raise ConfigError(_unknown(name, pool, names))
        chosen.update(taken)
    return sorted(chosen)


def num_images(one: Snapshot) -> int | None:
    """Return the number of images in a snapshot's manifest; None if it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.data.manifest import MANIFEST

    try:
        return pq.read_metadata(one.folder / MANIFEST).num_rows
    except (OSError, pa.ArrowInvalid):  # the stages report problems after fetching it
        return None


def source_names(entries: Iterable[str]) -> list[str]:
    """Return the distinct source names of snapshots."""
    return sorted({entry.partition("/")[0] for entry in entries})


def name_for(checkout: Path, folder: Path) -> str:
    """Return a valid source name for a user's folder, derived from its own, that no other folder's source has."""
    folder = folder.resolve()
    name = slugify(folder.name, max_length=MAX_NAME) or "images"
    taken = {SAMPLE, *(one.source for one in snapshots(checkout) if not _is_from(one, folder))}
    number, free = 2, name
    while free in taken:
        free = f"{name[: MAX_NAME - 1 - len(str(number))]}-{number}"
        number += 1
    return free


def _is_from(one: Snapshot, folder: Path) -> bool:
    return one.provenance is not None and one.provenance.source == str(folder)


def _empty(pool: set[str]) -> str:
    if pool:
        given = f"all sources ({', '.join(sorted(pool))}) were given to one run each (`pedigree run --images`)"
        return f"{given}; `pedigree ingest FOLDER --name NAME --license LICENSE` adds one permanently"
    return "the pool is empty: `pedigree ingest FOLDER --name NAME --license LICENSE` fills it"


def _unknown(name: str, pool: set[str], names: set[str]) -> str:
    if name in pool:
        return (
            f"source {name!r} was given to one run (`pedigree run --images FOLDER`): give the folder again, or add "
            f"it permanently: `pedigree ingest FOLDER --name {name} --license LICENSE`"
        )
    return f"no source {name!r} in the pool; known: {', '.join(sorted(names)) or 'none'}"
