"""Compare two data versions: images added, removed or with another reason; shifts of sources, licenses and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.git import git, try_git
from components.core.layout import RELATIVE
from components.core.page import Cell, Picture, render
from components.core.pictures import Tile, draw_sheet, fit, in_columns, jpeg
from components.core.references import DATA_ID, RUN_ID, ModelReference
from components.core.text import one_line
from components.data.manifest import MANIFEST
from components.data.shards import decode_image
from components.lineage.holdings import Data, find_holdings
from components.lineage.image_index import ImageIndex
from components.lineage.lock_file import Record, RecordError
from components.lineage.provenance import CURATED, POOL
from components.lineage.seen import find_record_of

ABSENT = "not there"  # state of an image that the other version does not know
EXACT = "exact_duplicate"  # of an image that is listed again: its other row says more
ATTRIBUTES = ("source", "license", "label")
SAMPLES, COLUMNS = 24, 8  # pictures of a sheet, and in a row of it
ROWS_ON_PAGE = 40


@dataclass(frozen=True)
class Side:
    """One of the two versions: a curated set, or one or all snapshots of a pool."""

    name: str
    data: tuple[Data, ...]


@dataclass(frozen=True)
class Shift:
    """Images of one source, license or class in both versions, and the change of its share."""

    value: str
    before: int
    after: int
    share: float  # after minus before, of all images of the version


@dataclass(frozen=True)
class DataDiff:
    """How a version differs from another one.

    Attributes:
        before: the first version.
        after: the second version.
        images: number of images in each.
        added: ids of images in the second one only.
        removed: ids of images in the first one only.
        changed: number of images that are in both, or out of both, for another reason.
        changes: (state before, state after, images), most first; a state is such as `in: balanced`.
        shifts: by `ATTRIBUTES`, largest first.
    """

    before: Side
    after: Side
    images: tuple[int, int]
    added: list[str]
    removed: list[str]
    changed: int
    changes: list[tuple[str, str, int]]
    shifts: dict[str, list[Shift]]


def find_side(text: str, root: Path, pool: bool) -> Side:
    """Return what a person means by a DVC id, or by a run id, a revision or a registered version.

    Args:
        text: any of these.
        root: the checkout.
        pool: of a run, revision or version: compare its pool rather than its curated set.

    Raises:
        ConfigError: none of these, or it has no such data.
        RecordError: a registered version is not found, or its record is not here.
    """
    if DATA_ID.fullmatch(text):
        dvc_id = f"{text.removesuffix('.dir')}.dir"
        known = [data for data in find_holdings(root).data if data.dvc == dvc_id]
        if not known:
            raise ConfigError(f"{text}: no commit here names such data")
        return Side(f"{known[0].path} {dvc_id[:12]}", (known[0],))
    record = _record(text, root)
    if pool:
        found = [Data(path, dvc) for path, dvc in record.tracked(POOL).items()]
    else:
        curated = record.output(CURATED) if record.read(str(RELATIVE.dvc_lock)) else None
        found = [Data(CURATED, curated)] if curated else []
    if not found:
        raise ConfigError(f"{text}: has no {'snapshot of the pool' if pool else 'curated set in its dvc.lock'}")
    ids = "" if len(found) > 1 else f" {found[0].dvc[:12]}"
    return Side(f"{'pool' if pool else CURATED}{ids} of {text}", tuple(found))


def compare(before: Side, after: Side, root: Path) -> DataDiff:
    """Compare two versions by the ids of their images; those with blurred faces by their ids in the pool.

    Raises:
        RecordError: a manifest is gone or damaged.
        StorageError: the DVC remote does not answer, or lacks it.
    """
    index = ImageIndex(root)
    old, new = (_states(index, side) for side in (before, after))
    both = old.join(new, how="outer", lsuffix="_before", rsuffix="_after")
    for column in ("state_before", "state_after"):
        both[column] = both[column].fillna(ABSENT)
    was, now = (both[f"state_{when}"].str.startswith("in: ") for when in ("before", "after"))
    differs = both["state_before"] != both["state_after"]
    counts = both[differs].groupby(["state_before", "state_after"]).size().sort_values(ascending=False, kind="stable")
    kept = tuple(states[states["state"].str.startswith("in: ")] for states in (old, new))
    known = (both["state_before"] != ABSENT) & (both["state_after"] != ABSENT)
    return DataDiff(
        before=before,
        after=after,
        images=(len(kept[0]), len(kept[1])),
        added=both.index[now & ~was].tolist(),
        removed=both.index[was & ~now].tolist(),
        changed=int((differs & known & (was == now)).sum()),
        changes=[(str(a), str(b), int(count)) for (a, b), count in counts.items()],
        shifts={name: _shifts(kept[0][name], kept[1][name]) for name in ATTRIBUTES},
    )


def render_diff(found: DataDiff, root: Path) -> bytes:
    """The page: counts, changes, shifts, and pictures of a sample of the images."""
    sheets = []
    for title, ids, side in (("Added", found.added, found.after), ("Removed", found.removed, found.before)):
        picture, note = _sheet(ids, side, root)
        sheets.append({"title": title, "count": len(ids), "picture": picture, "note": note})
    return render(
        "components/lineage/data_diff.html",
        title=f"From {found.before.name} to {found.after.name}",
        key=[
            ("images before", found.images[0], ""),
            ("images after", found.images[1], ""),
            ("added", len(found.added), ""),
            ("removed", len(found.removed), ""),
            ("another reason", found.changed, ""),
        ],
        changes=found.changes,
        shifts={name: [_shift_row(one) for one in rows[:ROWS_ON_PAGE]] for name, rows in found.shifts.items()},
        more={name: max(0, len(rows) - ROWS_ON_PAGE) for name, rows in found.shifts.items()},
        sheets=sheets,
        data=[(when, data.path, data.dvc) for when, side in (("before", found.before), ("after", found.after))
              for data in side.data],
    )  # fmt: skip


def _shift_row(one: Shift) -> tuple[str, int, int, Cell]:
    return one.value, one.before, one.after, Cell(f"{100 * one.share:+.2f} %")


def _record(text: str, root: Path) -> Record:
    name = text.removeprefix("runs/")
    if RUN_ID.fullmatch(name):
        refs = git(
            root, "for-each-ref", "--format=%(refname)", f"refs/heads/runs/{name}", f"refs/remotes/*/runs/{name}"
        )
        if refs:
            return Record(root, refs.splitlines()[0])
        raise ConfigError(f"{text}: no such run here; see `pedigree runs`, or fetch its branch")
    if ModelReference.parse(text):
        return find_record_of(text, root)[1]
    commit = try_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    if commit is None:
        raise ConfigError(f"{text!r}: no data version; give a DVC id, a run id, a revision or NAME@ALIAS")
    return Record(root, commit)


def _states(index: ImageIndex, side: Side) -> Any:
    """Return a data frame of the state of each image by its id in the pool, with its attributes."""
    rows = pa.concat_tables([index.rows(data) for data in side.data])
    rows = rows.filter(pc.invert(pc.fill_null(pc.equal(rows["pool_id"], rows["image_id"]), False)))  # pyright: ignore[reportAttributeAccessIssue]
    frame: Any = rows.select(["image_id", "pool_id", "kept", "reason", *ATTRIBUTES]).to_pandas()  # pandas' types vary
    frame["image_id"] = frame["pool_id"].fillna(frame["image_id"])
    frame["state"] = frame["kept"].map({True: "in: ", False: "out: "}) + frame["reason"]
    frame["rank"] = 2 * ~frame["kept"] + (frame["reason"] == EXACT)
    frame = frame[frame["image_id"] != ""].sort_values(["image_id", "rank"], kind="stable")
    return frame.drop_duplicates("image_id").set_index("image_id")[["state", *ATTRIBUTES]]


def _shifts(before: Any, after: Any) -> list[Shift]:
    old, new = (values.fillna("(none)").value_counts().to_dict() for values in (before, after))
    sizes = max(len(before), 1), max(len(after), 1)
    found = [
        Shift(
            str(value),
            old.get(value, 0),
            new.get(value, 0),
            new.get(value, 0) / sizes[1] - old.get(value, 0) / sizes[0],
        )
        for value in {**old, **new}
    ]
    return sorted(found, key=lambda one: (-abs(one.share), one.value))


def _sheet(ids: Sequence[str], side: Side, root: Path) -> tuple[Picture | None, str]:
    """Return pictures of evenly spaced images, which is a random sample, as ids are hashes; and a note on gaps."""
    step = max(1, len(ids) // SAMPLES)
    chosen, tiles, lost = set(ids[::step][:SAMPLES]), [], []
    objects = ImageIndex(root).objects
    for data in side.data:
        files = objects.listing(data.dvc)
        for row in objects.table(files[MANIFEST]).to_pylist() if chosen else ():
            image_id = row.get("derived_from") or row["image_id"]
            if image_id not in chosen:
                continue
            try:
                bytes_ = objects.read_range(files[row["shard"]], row["offset"], row["length"])
                if hashlib.sha256(bytes_).hexdigest() != row["image_id"]:
                    raise RecordError("other bytes")
                captions = (one_line(row["source"], 30), one_line(row.get("origin") or row.get("label") or "", 30))
                tiles.append(Tile(fit(decode_image(bytes_)), captions))
            except (PedigreeError, KeyError):
                lost.append(row["image_id"])
    note = f"{len(lost)} of the sample cannot be read any more, such as {lost[0]}." if lost else ""
    sheet = jpeg(draw_sheet(in_columns(tiles, COLUMNS))) if tiles else None
    return (Picture(sheet, f"Sample of {len(tiles)} images", "jpeg") if sheet else None), note
