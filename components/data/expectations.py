"""The door that a dataset passes: what must hold of its rows and bytes, checked, shown in Data Docs, and enforced.

Exact facts about all rows (uniqueness, places inside shards, counts) are computed in Arrow and NumPy and given to
Great Expectations as one row of failure counts; a seeded sample of the rows goes through its column expectations.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.data.manifest import (
    CURATED_SCHEMA,
    MANIFEST,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    read_manifest,
    read_table,
    write_table,
)
from components.data.shards import ALLOWED_FORMATS, ShardError, ShardReader

SAMPLE_ROWS = 100_000  # go through the column expectations
SAMPLE_IMAGES = 256  # have their bytes hashed again
SHOWN_IDS = 10
FAILING_ROWS = "failing-rows.parquet"

Mask = NDArray[np.bool_]
pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class SnapshotFacts:
    """What ingest counted, for the manifest to agree with."""

    source: str
    seen: int
    stored: int  # in all snapshots of this ingest
    already_present: int


@dataclass(frozen=True)
class Check:
    """One expectation and its outcome."""

    name: str
    meaning: str
    checked: int  # rows, or images
    failing: int

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return self.failing == 0


@dataclass(frozen=True)
class ValidationReport:
    """All expectations of a dataset, passed."""

    rows: int
    checks: list[Check]
    docs: Path  # index page of the Data Docs


class ExpectationsFailed(ValueError):  # noqa: N818 - it reads as what happened
    """A dataset that may not pass; the message names each failed expectation and its first rows."""


@dataclass
class _Examination:
    """The rows of a dataset, and the checks made of them."""

    table: pa.Table
    checks: list[Check]
    masks: dict[str, Mask]  # check -> failing rows

    def rows(self, name: str, meaning: str, failing: Mask) -> None:
        """Record a check of every row."""
        self.checks.append(Check(name, meaning, len(failing), int(failing.sum())))
        self.masks[name] = failing

    def fact(self, name: str, meaning: str, difference: int) -> None:
        """Record a check of the dataset as a whole, which fails by some difference."""
        self.checks.append(Check(name, meaning, 1, abs(difference)))


def validate_snapshot(folder: Path, facts: SnapshotFacts, docs_folder: Path) -> ValidationReport:
    """Check a snapshot's manifest against its schema, its shards and what ingest counted.

    Args:
        folder: the snapshot, complete but perhaps not in its final place.
        facts: what ingest counted.
        docs_folder: replaced by Data Docs of this validation.

    Raises:
        ExpectationsFailed: with the failing rows in `docs_folder/failing-rows.parquet`.
    """
    table = read_manifest(folder / MANIFEST)
    rejected = read_table(folder / REJECTED, QUARANTINE_SCHEMA)
    examination = _examine(table, folder)
    known = _mask(pc.equal(table["source"], facts.source))
    examination.rows("source_known", f"source is {facts.source}", ~known)
    images = examination.table["image_id"].to_numpy()
    examination.rows("ids_sorted", "rows are in order of image_id", np.append(False, images[1:] < images[:-1]))
    missing = facts.seen - facts.stored - facts.already_present - rejected.num_rows
    examination.fact("counts_add_up", "files seen = stored + already present + rejected", missing)
    examination.fact("rows_stored", "no more rows than images stored", max(0, table.num_rows - facts.stored))
    return _judge(examination, POOL_SCHEMA, docs_folder, f"snapshot of {facts.source}")


def validate_curated(folder: Path, pool_images: int, docs_folder: Path) -> ValidationReport:
    """Check a curated set: as a snapshot, and that each image of the pool is either in it or rejected.

    Args:
        folder: the curated set.
        pool_images: rows of the pool's manifests.
        docs_folder: replaced by Data Docs of this validation.

    Raises:
        ExpectationsFailed: with the failing rows in `docs_folder/failing-rows.parquet`.
    """
    table = read_manifest(folder / MANIFEST)
    rejected = read_table(folder / REJECTED, REJECTED_SCHEMA)
    examination = _examine(table, folder)
    origins = pa.array(["seed", "retrieved", "balanced"])
    examination.rows(
        "origin_known", "origin is seed, retrieved or balanced", ~_mask(pc.is_in(table["origin"], origins))
    )
    examination.fact("counts_add_up", "pool = kept + rejected", pool_images - table.num_rows - rejected.num_rows)
    return _judge(examination, CURATED_SCHEMA, docs_folder, "curated set")


def _examine(table: pa.Table, folder: Path) -> _Examination:
    """The checks that hold for every manifest, over all rows."""
    examination = _Examination(table, [], {})
    examination.fact("not_empty", "there is at least one image", int(table.num_rows == 0))
    is_id = _mask(pc.match_substring_regex(table["image_id"], "^[0-9a-f]{64}$"))
    examination.rows("ids_are_sha256", "image_id is 64 hexadecimal digits", ~is_id)
    _, inverse, counts = np.unique(table["image_id"].to_numpy().astype(str), return_inverse=True, return_counts=True)
    examination.rows("ids_unique", "no image_id is there twice", counts[inverse] > 1)
    sizes = _mask(pc.and_(pc.greater_equal(table["width"], 1), pc.greater_equal(table["height"], 1)))
    examination.rows("sizes_positive", "width and height are at least 1 pixel", ~sizes)
    licensed = _mask(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["license"])), 0))
    examination.rows("license_present", "license is not blank", ~licensed)
    outside = _outside_shards(table, folder)
    examination.rows("inside_shards", "the shard exists and holds offset + length", outside)
    examination.rows(
        "bytes_match_id", "bytes of a sample of images hash to their image_id", _wrong_bytes(table, folder)
    )
    return examination


def _mask(values: Any) -> Mask:
    return np.asarray(pc.fill_null(values, False).to_numpy(), dtype=bool)


def _outside_shards(table: pa.Table, folder: Path) -> Mask:
    encoded = table["shard"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    sizes = np.array([_shard_size(folder, name) for name in names] or [0], dtype=np.int64)
    size = sizes[encoded.indices.to_numpy()] if table.num_rows else np.zeros(0, dtype=np.int64)
    offset, length = table["offset"].to_numpy(), table["length"].to_numpy()
    # Subtracted and not added: a hostile length could overflow the sum.
    return (offset < 512) | (length < 1) | (length > size) | (offset > size - length)


def _shard_size(folder: Path, name: str) -> int:
    path = folder / name
    return path.stat().st_size if Path(name).name == name and path.is_file() else -1


def _wrong_bytes(table: pa.Table, folder: Path) -> Mask:
    wrong = np.zeros(table.num_rows, dtype=bool)
    reader = ShardReader(folder)
    rows = _sample(table.num_rows, SAMPLE_IMAGES)
    for index, row in zip(rows, table.take(pa.array(rows)).to_pylist(), strict=True):
        try:
            data = reader.read(row["shard"], row["offset"], row["length"])
        except ShardError:
            wrong[index] = True
        else:
            wrong[index] = hashlib.sha256(data).hexdigest() != row["image_id"]
    return wrong


def _sample(rows: int, most: int) -> NDArray[np.int64]:
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


def _judge(examination: _Examination, schema: pa.Schema, docs_folder: Path, what: str) -> ValidationReport:
    passed = _run_expectations(examination, schema, docs_folder, what)
    failed = [check for check in examination.checks if not check.passed]
    if failed:
        raise ExpectationsFailed(_describe(examination, failed, docs_folder, what))
    if not passed:
        raise ExpectationsFailed(f"{what}: a column expectation failed; see {docs_folder / 'index.html'}")
    return ValidationReport(examination.table.num_rows, examination.checks, docs_folder / "index.html")


def _describe(examination: _Examination, failed: list[Check], docs_folder: Path, what: str) -> str:
    lines = []
    any_failing = np.zeros(examination.table.num_rows, dtype=bool)
    for check in failed:
        mask = examination.masks.get(check.name)
        line = f"{check.name} ({check.meaning})"
        if mask is None:
            lines.append(f"{line}: off by {check.failing}")
            continue
        any_failing |= mask
        ids = examination.table["image_id"].take(pa.array(np.flatnonzero(mask)[:SHOWN_IDS])).to_pylist()
        more = ", ..." if check.failing > SHOWN_IDS else ""
        lines.append(f"{line}: {check.failing} of {check.checked} rows: {', '.join(ids)}{more}")
    path = docs_folder / FAILING_ROWS
    write_table(examination.table.filter(pa.array(any_failing)), examination.table.schema, path)
    return f"{what}: {len(failed)} expectations failed: {'; '.join(lines)}; all failing rows: {path}"


def _run_expectations(examination: _Examination, schema: pa.Schema, docs_folder: Path, what: str) -> bool:
    """Let Great Expectations judge the facts and a sample of rows, and write its Data Docs."""
    gx = _great_expectations()
    context = _context(gx, docs_folder)
    source = context.data_sources.add_pandas("pedigree")
    table = examination.table
    rows = table.take(pa.array(_sample(table.num_rows, SAMPLE_ROWS)))
    facts = pa.table({check.name: [check.failing] for check in examination.checks})
    suites = {
        "rows-sample": (rows, _row_expectations(gx, schema)),
        "facts-of-all-rows": (facts, [_none_failing(gx, check) for check in examination.checks]),
    }
    passed = True
    for name, (frame, expected) in suites.items():
        title = f"{what.replace(' ', '-')}-{name}"
        suite = context.suites.add(gx.ExpectationSuite(name=title, expectations=expected))
        batch = source.add_dataframe_asset(title).add_batch_definition_whole_dataframe(title)
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=title, data=batch, suite=suite))
        result = definition.run(batch_parameters={"dataframe": frame.to_pandas()}, result_format="SUMMARY")
        passed = passed and bool(result.success)
    context.build_data_docs()
    return passed


def _great_expectations() -> Any:
    """The library, quiet and without its analytics, which it switches on while it is imported."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations

    return great_expectations


def _context(gx: Any, docs_folder: Path) -> Any:
    """A context in memory, whose only Data Docs site is `docs_folder`."""
    from great_expectations.data_context.types import base

    shutil.rmtree(docs_folder, ignore_errors=True)
    docs_folder.mkdir(parents=True)
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_folder.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {
        "class_name": "SiteBuilder",
        "store_backend": store,
        "site_index_builder": index,
        "show_how_to_buttons": False,
    }
    config = base.DataContextConfig(
        data_docs_sites={"pedigree": site},
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=base.ProgressBarsConfig(globally=False, metric_calculations=False),
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _row_expectations(gx: Any, schema: pa.Schema) -> list[Any]:
    expect = gx.expectations
    return [
        expect.ExpectTableColumnsToMatchOrderedList(column_list=schema.names),
        *(expect.ExpectColumnValuesToNotBeNull(column=field.name) for field in schema if not field.nullable),
        expect.ExpectColumnValuesToMatchRegex(column="image_id", regex="^[0-9a-f]{64}$"),
        expect.ExpectColumnValuesToBeUnique(column="image_id"),
        expect.ExpectColumnValuesToMatchRegex(column="license", regex=r"\S"),
        *(expect.ExpectColumnValuesToBeBetween(column=name, min_value=1) for name in ("width", "height", "length")),
        expect.ExpectColumnValuesToBeInSet(column="format", value_set=list(ALLOWED_FORMATS)),
        expect.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "test"]),
    ]


def _none_failing(gx: Any, check: Check) -> Any:
    return gx.expectations.ExpectColumnValuesToBeBetween(
        column=check.name, min_value=0, max_value=0, notes=f"{check.meaning} ({check.checked} checked)"
    )
