"""Explain why an image is in the curated set or out of it, from the set's two tables of any size."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as ds

from components.core.storage import sha256_file
from components.curation.config import CurationError
from components.curation.rejections import MEANING
from components.data.manifest import CURATED_SCHEMA, FINDINGS, REJECTED_SCHEMA, snapshot_manifests

SHOWN_MATCHES = 5
EXACT = "exact_duplicate"
ID_PREFIX = re.compile(r"[0-9a-f]{4,64}")
ORIGIN = {
    "seed": "it belongs to a seed set that is taken as it is",
    "retrieved": "it is near an image of a seed set",
    "balanced": "it was drawn in the balanced sample of its cluster",
}
pc: Any = pyarrow.compute  # created at import, invisible to pyright


@dataclass(frozen=True)
class CuratedTables:
    """Tables of a curated set."""

    manifest: Path
    rejected: Path
    evaluation: Path | None = None  # the evaluation sets, if available, to name originals of copies


@dataclass(frozen=True)
class Mention:
    """A related image of an explanation."""

    image_id: str
    where: str  # kept | left out | evaluation set | not at hand
    source: str | None = None
    source_uri: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Curation results of one image of the pool."""

    image_id: str  # in the pool
    source: str
    source_uri: str
    kept: bool
    reason: str  # an origin, or a reason of rejection
    meaning: str
    detail: str | None
    similarity: float | None  # to `other`
    other: Mention | None  # the image that it duplicates, or the seed that retrieved it
    seed_set: str | None
    packed_as: str | None  # its id in the curated set, if faces were blurred
    cluster_path: str | None
    scores: dict[str, float]
    group: list[Mention] = field(default_factory=list)  # the other images of its group of duplicates
    listed_again: list[str] = field(default_factory=list)  # other places of the same bytes in the pool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class NoSuchImageError(CurationError):
    """The curated set's two tables have no such image."""


def explain(tables: CuratedTables, query: str) -> Explanation:
    """Find an image, and explain why it is in or out.

    Args:
        tables: of the curated set.
        query: an image id or its prefix, a source URI or its last part, or a file with the image's bytes.

    Raises:
        NoSuchImageError: nothing matches.
        CurationError: several images do, or a table cannot be read.
    """
    for path, schema in ((tables.manifest, CURATED_SCHEMA), (tables.rejected, REJECTED_SCHEMA)):
        if missing := sorted(set(schema.names) - set(_open(path).schema.names)):
            raise CurationError(f"{path}: an older version of Pedigree wrote it, without {missing}; run it again")
    kept = [_pool_row(row) for row in _matching(tables.manifest, query, ("image_id", "derived_from"))]
    rejected = _matching(tables.rejected, query, ("image_id",))
    again = [row for row in rejected if row["reason"] == EXACT]
    once = [row for row in rejected if row["reason"] != EXACT]
    found = {row["image_id"]: row for row in [*again, *once, *kept]}  # later ones override: they have the final outcome
    if not found:
        raise NoSuchImageError(f"{query!r}: no such image in {tables.manifest.parent}; give an id or a source URI")
    if len(found) > 1:
        listed = ", ".join(f"{i[:16]} ({row['source_uri']})" for i, row in list(found.items())[:SHOWN_MATCHES])
        more = ", ..." if len(found) > SHOWN_MATCHES else ""
        raise CurationError(f"{query!r}: {len(found)} images match: {listed}{more}; give more of the id")
    (row,) = found.values()
    return _explanation(tables, row, [other for other in again if other is not row])


def _explanation(tables: CuratedTables, row: dict[str, Any], again: list[dict[str, Any]]) -> Explanation:
    kept = "origin" in row
    other = row["query_id"] if kept else row["duplicate_of"]
    scores = {f.name: row[f.name] for f in FINDINGS if f.name != "cluster_path" and row[f.name] is not None}
    return Explanation(
        image_id=row["image_id"],
        source=row["source"],
        source_uri=row["source_uri"],
        kept=kept,
        reason=row["origin"] if kept else row["reason"],
        meaning=ORIGIN[row["origin"]] if kept else MEANING[row["reason"]],
        detail=None if kept else row["detail"],
        similarity=row["similarity"],
        other=_mention(tables, other) if other else None,
        seed_set=row.get("seed_set"),
        packed_as=row.get("packed_as"),
        cluster_path=row["cluster_path"],
        scores=scores,
        group=_group(tables, row),
        listed_again=[f"{r['source']}: {r['source_uri']}" for r in again],
    )


def _matching(path: Path, query: str, id_columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Find rows by id or its prefix; if there are none, by source URI or its last part."""
    rows: list[dict[str, Any]] = []
    prefix = sha256_file(Path(query)) if Path(query).is_file() else query
    if ID_PREFIX.fullmatch(prefix):
        starts = [pc.starts_with(pc.field(name), prefix) for name in id_columns]
        rows = _rows(path, starts[0] if len(starts) == 1 else starts[0] | starts[1])
    uri = pc.field("source_uri")
    return rows or _rows(path, (uri == query) | pc.ends_with(uri, f"/{query}") | pc.ends_with(uri, f"#{query}"))


def _rows(path: Path, condition: Any) -> list[dict[str, Any]]:
    """Return the rows that match a condition, scanning the file."""
    try:
        return _open(path).to_table(filter=condition).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from None


def _open(path: Path) -> ds.Dataset:
    try:
        return ds.dataset(path, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CurationError:
    return CurationError(f"{path}: not a readable table: {str(error).splitlines()[0]}")


def _pool_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the curated manifest under its id in the pool."""
    packed = row["derived_from"] is not None
    return row | {"image_id": row["derived_from"] or row["image_id"], "packed_as": row["image_id"] if packed else None}


def _group(tables: CuratedTables, row: dict[str, Any]) -> list[Mention]:
    if row["group_id"] is None:
        return []
    same = pc.field("group_id") == row["group_id"]
    members = [_kept(other) for other in _rows(tables.manifest, same)]
    members += [_named(other, "left out") for other in _rows(tables.rejected, same)]
    return [member for member in members if member.image_id != row["image_id"]]


def _mention(tables: CuratedTables, image_id: str) -> Mention:
    """Look up an image that another row refers to."""
    same, derived = pc.field("image_id") == image_id, pc.field("derived_from") == image_id
    if rows := _rows(tables.manifest, same | derived):
        return _kept(rows[0])
    if rows := _rows(tables.rejected, same):
        return _named(rows[0], "left out")
    for path in snapshot_manifests(tables.evaluation) if tables.evaluation else []:
        if rows := _rows(path, same):
            return _named(rows[0], "evaluation set")
    return Mention(image_id, "not at hand")


def _kept(row: dict[str, Any]) -> Mention:
    return _named(_pool_row(row), "kept")


def _named(row: dict[str, Any], where: str) -> Mention:
    return Mention(row["image_id"], where, row["source"], row["source_uri"])
