"""What a takedown would concern: images, snapshots of the checkout, data versions, runs and models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from components.core.config import ConfigError
from components.core.text import some_of
from components.data.manifest import snapshot_manifests
from components.lineage.takedown import COLLECTIONS, snapshots_with
from components.lineage.where_used import Query, Search, Uses

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class Impact:
    """What a takedown would concern.

    Attributes:
        images: ids of the images, sorted.
        nowhere: how many of them no data version holds; later ingests refuse them all the same.
        sources: images in the pool and the evaluation sets, by source; one in two sources counts twice.
        snapshots: images in each snapshot of the checkout that holds any.
        versions: path, DVC id and number of images of each data version of any branch that holds any.
        runs: ids of the runs that used one of them.
        learned: registered versions that may have learned the images, with why.
        beside: other registered versions with an image in their pool or evaluation set, with why.
        aliases: of the versions that have any.
        unknown: lines about what could not be searched.
    """

    images: tuple[str, ...]
    nowhere: int
    sources: Mapping[str, int]
    snapshots: Mapping[str, int]
    versions: list[tuple[str, str, int]]
    runs: list[str]
    learned: Mapping[str, str]
    beside: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    unknown: list[str]


def assess(root: Path, query: Query) -> Impact:
    """Find what the images of a query are used in.

    Args:
        root: the checkout; the data of its snapshots must be in place.
        query: ids, a source or a license.

    Raises:
        ConfigError: there are no images of the source or under the license.
        StorageError, TrackingError: as of `where_used`.
    """
    search, here = Search(root), list(_snapshots(root))
    images = set(query.images)
    if not images:
        images = _kept(search.find(query)) | {id_ for table in here for id_ in _matching(table, query)}
        if not images:
            raise ConfigError(_no_images(query, here))
    uses = search.find(Query(frozenset(images)))
    rows = [table.filter(pc.is_in(table["image_id"], pa.array(sorted(images)))) for table in here]
    sources = Counter(pair for table in rows for pair in _pairs(table))
    sources |= Counter(pair for use in uses.data if use.data.kind != "curated" for pair in _pairs(use.kept))
    found = {id_ for id_, _ in sources} | _kept(uses)
    models = {model.reference: model for model in uses.models}
    return Impact(
        images=tuple(sorted(images)),
        nowhere=len(images - found),
        sources=dict(sorted(Counter(source for _, source in sources).items())),
        snapshots=snapshots_with(root, images),
        versions=[(use.data.path, use.data.dvc, len(use.kept)) for use in uses.data if len(use.kept)],
        runs=uses.runs,
        learned={name: _why(model) for name, model in models.items() if model.learned},
        beside={name: _why(model) for name, model in models.items() if not model.learned},
        aliases={name: model.aliases for name, model in models.items() if model.aliases},
        unknown=[*uses.unknown, *uses.given_up],
    )


def _snapshots(root: Path) -> Iterator[pa.Table]:
    """Yield the images of each snapshot on disk, tracked or not."""
    for path in (path for folder in COLLECTIONS for path in snapshot_manifests(root / folder)):
        yield pq.read_table(path, columns=["image_id", "source", "license"])


def _kept(uses: Uses) -> set[str]:
    """Return the ids, in the pool or an evaluation set, of the images that any data version holds."""
    found: set[str] = set()
    for use in uses.data:
        found |= set(pc.coalesce(use.kept["pool_id"], use.kept["image_id"]).to_pylist())
    return found


def _matching(table: pa.Table, query: Query) -> list[str]:
    name = "source" if query.source is not None else "license"
    return table.filter(pc.equal(table[name], getattr(query, name)))["image_id"].to_pylist()


def _pairs(table: pa.Table) -> set[tuple[str, str]]:
    return set(zip(table["image_id"].to_pylist(), table["source"].to_pylist(), strict=True))


def _why(model: Any) -> str:
    taught = [f"made from {some_of(model.teachers)}"] if model.teachers else []
    return ", ".join([*model.relations, *taught])


def _no_images(query: Query, here: Iterable[pa.Table]) -> str:
    name = "source" if query.source is not None else "license"
    known = sorted({value for table in here for value in table[name].unique().to_pylist()})
    return f"{query}: no data version has images of it; the checkout has {some_of(known, 10) or 'no images'}"
