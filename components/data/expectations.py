"""Validate a dataset's rows and bytes with Great Expectations, and write Data Docs.

Exact facts about all rows (uniqueness, places inside shards, counts) are computed in Arrow and NumPy and passed to
Great Expectations as one row of failure counts; a seeded sample of rows is validated by its column expectations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.core.storage import write_json
from components.data.manifest import (
    MANIFEST,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    REJECTED,
    read_manifest,
    read_table,
    write_table,
)
from components.data.shards import ALLOWED_FORMATS, ShardReader

SAMPLE_ROWS = 100_000  # validated by the column expectations
SAMPLE_IMAGES = 256  # whose bytes are hashed again
SHOWN_IDS = 10
FAILING_ROWS = "failing-rows.parquet"
VALIDATION = "validation.json"  # beside what passed: its checks, for readers without Data Docs
FAILED = "expectations failed"  # in the message of every refusal

Mask = NDArray[np.bool_]
pc: Any = pyarrow.compute  # created at import, invisible to pyright


@dataclass(frozen=True)
class SnapshotFacts:
    """Counts of ingest, which the manifest must match."""

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
    allowed: int = 0  # to fail

    @property
    def passed(self) -> bool:
        """Whether at most `allowed` failed."""
        return self.failing <= self.allowed


@dataclass(frozen=True)
class ValidationReport:
    """The passed expectations of a dataset."""

    rows: int
    checks: list[Check]
    docs: Path  # index page of the Data Docs


@dataclass
class Examination:
    """Rows of a dataset with their checks."""

    table: pa.Table  # with a column image_id
    checks: list[Check] = field(default_factory=list)
    masks: dict[str, Mask] = field(default_factory=dict)  # check -> failing rows

    def rows(self, name: str, meaning: str, failing: Mask) -> None:
        """Record a check of every row."""
        self.checks.append(Check(name, meaning, len(failing), int(failing.sum())))
        self.masks[name] = failing

    def sampled(self, name: str, meaning: str, failing: Mask, checked: int, allowed: int) -> None:
        """Record a check of a sample of the rows, of which `allowed` may fail."""
        self.checks.append(Check(name, meaning, checked, int(failing.sum()), allowed))
        self.masks[name] = failing

    def fact(self, name: str, meaning: str, difference: int) -> None:
        """Record a check of the whole dataset, which fails unless `difference` is 0."""
        self.checks.append(Check(name, meaning, 1, abs(difference)))


def validate_snapshot(folder: Path, facts: SnapshotFacts, docs_folder: Path) -> ValidationReport:
    """Check a snapshot's manifest against its schema, its shards and what ingest counted.

    Args:
        folder: the complete snapshot, possibly in a staging directory.
        facts: what ingest counted.
        docs_folder: replaced by Data Docs of this validation.

    Raises:
        DatasetError: with the failing rows in `docs_folder/failing-rows.parquet`.
    """
    table = read_manifest(folder / MANIFEST)
    rejected = read_table(folder / REJECTED, QUARANTINE_SCHEMA)
    examination = examine_manifest(table, folder)
    known = mask_of(pc.equal(table["source"], facts.source))
    examination.rows("source_known", f"source is {facts.source}", ~known)
    images = examination.table["image_id"].to_numpy()
    examination.rows("ids_sorted", "rows are in order of image_id", np.append(False, images[1:] < images[:-1]))
    missing = facts.seen - facts.stored - facts.already_present - rejected.num_rows
    examination.fact("counts_add_up", "files seen = stored + already present + rejected", missing)
    examination.fact("rows_stored", "no more rows than images stored", max(0, table.num_rows - facts.stored))
    with DataDocs(docs_folder) as docs:
        return docs.judge(examination, f"snapshot of {facts.source}", POOL_SCHEMA)


def examine_manifest(table: pa.Table, folder: Path) -> Examination:
    """Run the checks common to all manifests, over all rows and over the bytes of a sample."""
    examination = Examination(table)
    examination.fact("not_empty", "there is at least one image", int(table.num_rows == 0))
    is_id = mask_of(pc.match_substring_regex(table["image_id"], "^[0-9a-f]{64}$"))
    examination.rows("ids_are_sha256", "image_id is 64 hexadecimal digits", ~is_id)
    _, inverse, counts = np.unique(table["image_id"].to_numpy().astype(str), return_inverse=True, return_counts=True)
    examination.rows("ids_unique", "no image_id is there twice", counts[inverse] > 1)
    sizes = mask_of(pc.and_(pc.greater_equal(table["width"], 1), pc.greater_equal(table["height"], 1)))
    examination.rows("sizes_positive", "width and height are at least 1 pixel", ~sizes)
    licensed = mask_of(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["license"])), 0))
    examination.rows("license_present", "license is not blank", ~licensed)
    outside = _outside_shards(table, folder)
    examination.rows("inside_shards", "the shard exists and holds offset + length", outside)
    examination.rows(
        "bytes_match_id", "bytes of a sample of images hash to their image_id", _wrong_bytes(table, folder)
    )
    return examination


def mask_of(values: Any) -> Mask:
    """Convert an Arrow column of booleans to NumPy, with nulls as False."""
    return np.asarray(pc.fill_null(values, False).to_numpy(), dtype=bool)


def _outside_shards(table: pa.Table, folder: Path) -> Mask:
    encoded = table["shard"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    sizes = np.array([_shard_size(folder, name) for name in names] or [0], dtype=np.int64)
    size = sizes[encoded.indices.to_numpy()] if table.num_rows else np.zeros(0, dtype=np.int64)
    offset, length = table["offset"].to_numpy(), table["length"].to_numpy()
    # Subtraction, because a hostile length could overflow a sum.
    return (offset < 512) | (length < 1) | (length > size) | (offset > size - length)


def _shard_size(folder: Path, name: str) -> int:
    path = folder / name
    return path.stat().st_size if Path(name).name == name and path.is_file() else -1


def _wrong_bytes(table: pa.Table, folder: Path) -> Mask:
    wrong = np.zeros(table.num_rows, dtype=bool)
    reader = ShardReader(folder)
    rows = sampled_rows(table.num_rows, SAMPLE_IMAGES)
    for index, row in zip(rows, table.take(pa.array(rows)).to_pylist(), strict=True):
        try:
            data = reader.read(row["shard"], row["offset"], row["length"])
        except DatasetError:
            wrong[index] = True
        else:
            wrong[index] = hashlib.sha256(data).hexdigest() != row["image_id"]
    return wrong


def write_checks(path: Path, checks: Iterable[tuple[str, Check]]) -> None:
    """Write passed checks as JSON, each with the name of what was examined."""
    write_json(path, [{"of": what, **dataclasses.asdict(check)} for what, check in checks])


def sampled_rows(rows: int, most: int) -> NDArray[np.int64]:
    """Return the ascending indices of all rows, or of `most` rows drawn with seed 0."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


class DataDocs:
    """Validations of one dataset by Great Expectations, shown on one Data Docs site.

    Args:
        folder: replaced by the site, which is written at the end of the block, even after an error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._gx = _great_expectations()
        self._context = _context(self._gx, folder)
        self._source = self._context.data_sources.add_pandas("pedigree")
        self._suites = 0
        self.passed: list[tuple[str, Check]] = []  # each check, with the name of its examination

    def __enter__(self) -> DataDocs:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._context.build_data_docs()

    def judge(self, examination: Examination, what: str, schema: pa.Schema | None = None) -> ValidationReport:
        """Validate an examination, and with a schema also a sample of its rows by column expectations.

        Raises:
            DatasetError: with the failing rows in `folder/failing-rows.parquet`.
        """
        checks = examination.checks
        facts = pa.table({check.name: [check.failing] for check in checks})
        passed = self._run(f"{what} facts of all rows", facts, [_few_failing(self._gx, check) for check in checks])
        if schema is not None:
            rows = examination.table.take(pa.array(sampled_rows(examination.table.num_rows, SAMPLE_ROWS)))
            passed = self._run(f"{what} rows sample", rows, _row_expectations(self._gx, schema)) and passed
        failed = [check for check in checks if not check.passed]
        if failed:
            raise DatasetError(_describe(examination, failed, self.folder, what))
        if not passed:
            raise DatasetError(f"{what}: column {FAILED}; see {self.folder / 'index.html'}")
        self.passed += [(what, check) for check in checks]
        return ValidationReport(examination.table.num_rows, checks, self.folder / "index.html")

    def _run(self, title: str, frame: pa.Table, expected: list[Any]) -> bool:
        self._suites += 1
        name = f"{self._suites}-{title.replace(' ', '-')}"
        suite = self._context.suites.add(self._gx.ExpectationSuite(name=name, expectations=expected))
        batch = self._source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
        definition = self._gx.ValidationDefinition(name=name, data=batch, suite=suite)
        definition = self._context.validation_definitions.add(definition)
        result = definition.run(batch_parameters={"dataframe": frame.to_pandas()}, result_format="SUMMARY")
        return bool(result.success)


def _describe(examination: Examination, failed: list[Check], docs_folder: Path, what: str) -> str:
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
        few = f", {check.allowed} allowed" if check.allowed else ""
        lines.append(f"{line}: {check.failing} of {check.checked}{few} rows: {', '.join(ids)}{more}")
    path = docs_folder / FAILING_ROWS
    write_table(examination.table.filter(pa.array(any_failing)), examination.table.schema, path)
    return f"{what}: {len(failed)} {FAILED}: {'; '.join(lines)}; all failing rows: {path}"


def _great_expectations() -> Any:
    """Import the library, with logging reduced and analytics off; it enables analytics at import."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations

    return great_expectations


def _context(gx: Any, docs_folder: Path) -> Any:
    """Return an in-memory context whose only Data Docs site is `docs_folder`."""
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


def _few_failing(gx: Any, check: Check) -> Any:
    return gx.expectations.ExpectColumnValuesToBeBetween(
        column=check.name, min_value=0, max_value=check.allowed, notes=f"{check.meaning} ({check.checked} checked)"
    )
