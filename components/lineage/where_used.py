"""Find where images are used: data versions, commits, runs, and the models that they lead to.

All commits of all branches are searched, and all registered versions. An index of the images of each data version
(`image_index.py`) is made at its first search.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from pydantic import ValidationError

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.core.mlflow_client import server_uri
from components.core.storage import MissingInStorageError, sha256_file
from components.core.text import some_of
from components.data.provenance import SUFFIX, Provenance
from components.lineage.holdings import Data, Holders, Registered, find_holdings, read_registry
from components.lineage.image_index import ImageIndex, Query
from components.lineage.lock_file import Record, RecordError
from components.lineage.provenance import CURATED
from components.lineage.seen import Training, read_history, steps_with

TRAINED, POOLED, EVALUATED = "trained on it", "in its pool", "evaluated on it"
_RELATIONS = {"curated": TRAINED, "pool": POOLED, "evaluation": EVALUATED}  # by kind of the data
KIND_ORDER = ("pool", "evaluation", "curated")
RUNS = "runs/"
ID_LENGTH = 64
ID_BEGINNING = re.compile(rf"[0-9a-f]{{8,{ID_LENGTH}}}")
# Of one data version, whose manifest is gone, damaged or of another form; the others are searched all the same.
NOT_READABLE = (RecordError, MissingInStorageError)

pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them

__all__ = ["Draw", "ModelUse", "Query", "Search", "Use", "Uses", "brought", "draws", "find"]


@dataclass(frozen=True)
class Use:
    """One data version with images of the query.

    Attributes:
        data: path, DVC id and kind (`pool`, `evaluation` or `curated`).
        rows: its matching images, columns as `image_index.SCHEMA`.
        commits: that recorded the version, oldest first.
        branches: whose last commit holds it.
    """

    data: Data
    rows: pa.Table
    commits: Sequence[str]
    branches: Sequence[str]

    @property
    def kept(self) -> pa.Table:
        """Rows of the images in the version."""
        return self.rows.filter(self.rows["kept"])

    @property
    def left_out(self) -> pa.Table:
        """Rows of the images that ingest or curation left out of the version."""
        return self.rows.filter(pc.invert(self.rows["kept"]))

    @property
    def runs(self) -> list[str]:
        """Ids of the runs whose branch holds the version."""
        return sorted({name.partition(RUNS)[2] for name in self.branches if RUNS in name})


@dataclass(frozen=True)
class ModelUse:
    """A registered version that images of the query lead to.

    Attributes:
        reference: `NAME/3`.
        aliases: of it.
        relations: of its own data: TRAINED, POOLED or EVALUATED; empty where only `teachers` were.
        data: data versions with the images.
        teachers: registered versions among these uses that taught it or that it started from.
    """

    reference: str
    aliases: tuple[str, ...]
    relations: tuple[str, ...]
    data: tuple[Data, ...]
    teachers: tuple[str, ...]

    @property
    def learned(self) -> bool:
        """Whether it, its teacher or its initial weights may have been trained on the images."""
        return TRAINED in self.relations or bool(self.teachers)


@dataclass(frozen=True)
class Uses:
    """Where the images of a query are used.

    Attributes:
        query: what was searched.
        data: data versions with the images, in or left out.
        models: registered versions, candidates and released ones.
        searched: number of data versions searched.
        unknown: lines about data versions, records and registered versions that could not be searched.
        given_up: lines about data versions that are stored nowhere, and that only earlier commits name.
    """

    query: Query
    data: list[Use] = field(default_factory=list)
    models: list[ModelUse] = field(default_factory=list)
    searched: int = 0
    unknown: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    @property
    def image_ids(self) -> list[str]:
        """Ids of all images found; of one with blurred faces the id in the pool and the one of the blurred image."""
        found = {id_ for use in self.data for id_ in use.rows["image_id"].to_pylist() if id_}
        found |= {id_ for use in self.data for id_ in use.rows["pool_id"].to_pylist() if id_}
        return sorted(found)

    @property
    def runs(self) -> list[str]:
        """Ids of the runs whose branch holds any of the data versions."""
        return sorted({run for use in self.data for run in use.runs})


@dataclass(frozen=True)
class Draw:
    """Draws of one image by one training of a model's history.

    Attributes:
        image_id: of the image; in the pool, if its faces were blurred.
        relation: of the training to the model or to the next training: `itself`, `started from` or `taught by`.
        version: registered version whose record has the training.
        weights: that it made.
        draws: how often the image was drawn.
        first: step of the first draw, counted from 1; None without draws.
        last: step of the last draw.
        of_steps: of the training.
    """

    image_id: str
    relation: str
    version: str
    weights: str
    draws: int
    first: int | None
    last: int | None
    of_steps: int


class Search:
    """All data versions of a repository, and its registry.

    Attributes:
        data: all data versions, by kind, newest first.
        unknown: lines about records and registered versions that cannot be read.

    Args:
        root: the checkout, or a clone with all branches.

    Raises:
        GitError: not a git repository.
        TrackingError: MLflow does not answer.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._holdings, self._index = root, find_holdings(root), ImageIndex(root)
        self.unknown = list(self._holdings.unknown)
        self._registry: list[Registered] = []
        if server_uri() is None:
            no_server = "no registry was searched: MLFLOW_TRACKING_URI is not set; run `pedigree up`, or set it"
            self.unknown.append(no_server)
        else:
            self._registry = read_registry(self._holdings.locks)
            self.unknown += [f"{version.reference}: {version.unknown}" for version in self._registry if version.unknown]
        self._stated = {data for version in self._registry for data in version.data}
        newest_first = [*reversed(self._holdings.data), *sorted(self._stated - set(self._holdings.data))]
        self.data = sorted(newest_first, key=lambda data: KIND_ORDER.index(data.kind))

    def query(self, text: str) -> Query:
        """Return what a person means: an image file, a source, a license, an image id or its beginning, or a URI.

        Raises:
            ConfigError: several images have ids that begin so.
            StorageError: the DVC remote does not answer, as in `find`.
        """
        if Path(text).is_file():
            return Query(frozenset([sha256_file(Path(text))]))
        for name in ("source", "license"):
            if any(row[name] == text for data in self.data for row in self._counts(data)):
                return Query(source=text) if name == "source" else Query(license=text)
        if not ID_BEGINNING.fullmatch(text):
            return Query(uri=text)
        found = self.find(Query(frozenset([text]))).image_ids if len(text) < ID_LENGTH else [text]
        found = [id_ for id_ in found if id_.startswith(text)]
        if len(found) > 1:
            raise ConfigError(f"{text}: {len(found)} images have ids that begin so: {some_of(found)}; give more of it")
        return Query(frozenset(found or [text]))

    def find(self, query: Query) -> Uses:
        """Search all data versions.

        Raises:
            StorageError: the DVC remote does not answer.
        """
        uses, unknown, given_up = [], list(self.unknown), []
        for data in self.data:
            try:
                rows = self._index.search(data, query)
            except NOT_READABLE as error:
                held = data in self._stated or self.holders(data).branches
                lines = unknown if held or not isinstance(error, MissingInStorageError) else given_up
                lines.append(f"{data.path} ({data.dvc}): not searched: {' '.join(str(error).split())}")
                continue
            if len(rows):
                holders = self.holders(data)
                uses.append(Use(data, rows, holders.commits, holders.branches))
        models = self.models_of(use.data for use in uses if len(use.kept))
        return Uses(query, uses, models, len(self.data), unknown, given_up)

    def holders(self, data: Data) -> Holders:
        """Return the commits and branches with a data version; none if only the registry names it."""
        return self._holdings.data.get(data, Holders())

    def models_of(self, data: Iterable[Data]) -> list[ModelUse]:
        """Return the registered versions with any of these data versions, and those that these taught or began."""
        return _models(self._registry, set(data))

    def _counts(self, data: Data) -> list[dict[str, Any]]:
        try:
            return self._index.counts(data)
        except NOT_READABLE:
            return []  # `find` says so


def find(root: Path, query: Query) -> Uses:
    """Search all data versions of a repository and its registry; raises as `Search` and its `find`."""
    return Search(root).find(query)


def brought(root: Path, use: Use) -> dict[str, Any]:
    """Return who ingested a snapshot, when and from where, as far as its commit says; empty else."""
    text = Record(root, use.commits[0]).read(use.data.path + SUFFIX) if use.commits else None
    try:
        return {} if text is None else Provenance.model_validate_json(text).model_dump(mode="json")
    except ValidationError:
        return {}


def draws(uses: Uses, root: Path) -> tuple[dict[str, list[Draw]], list[str]]:
    """Recompute when the trainings that led to each model drew the images.

    Args:
        uses: of few images; each training takes about the time of reading its manifest for each image.
        root: the checkout.

    Returns:
        The draws of each model that may have learned from the images, by reference, its own trainings first; and a
        line for each model whose trainings are not known.

    Raises:
        StorageError: the DVC remote does not answer.
    """
    held: dict[str, set[str]] = {}
    for use in (use for use in uses.data if use.data.kind == "curated"):
        ids = pc.coalesce(use.kept["pool_id"], use.kept["image_id"]).to_pylist()
        held.setdefault(use.data.dvc, set()).update(ids)
    found, unknown, known = {}, [], dict[tuple[str, str], list[int]]()
    for model in (model for model in uses.models if model.learned):
        try:
            trainings = read_history(model.reference, root).trainings
            found[model.reference] = [
                _draw(training, id_, known)
                for training in trainings
                for id_ in sorted(held.get(str(training.record.output(CURATED)), ()))
            ]
        except (RecordError, MissingInStorageError, DatasetError) as error:
            unknown.append(f"{model.reference}: when it drew them is not known: {error}")
    return found, unknown


def _draw(training: Training, image_id: str, known: dict[tuple[str, str], list[int]]) -> Draw:
    """Recompute the draws of an image, once for trainings of the same configuration and data."""
    key = (json.dumps(training.provenance, sort_keys=True), image_id)
    if key not in known:
        known[key] = steps_with(training, image_id)
    steps = known[key]
    return Draw(
        image_id=image_id,
        relation=training.relation,
        version=training.version,
        weights=training.weights,
        draws=len(steps),
        first=steps[0] if steps else None,
        last=steps[-1] if steps else None,
        of_steps=training.steps,
    )


def _models(registry: Sequence[Registered], kept: Set[Data]) -> list[ModelUse]:
    found: dict[str, ModelUse] = {}
    for version in registry:
        if data := tuple(sorted(version.data & kept)):
            relations = tuple(name for kind, name in _RELATIONS.items() if kind in {item.kind for item in data})
            found[version.reference] = ModelUse(version.reference, version.aliases, relations, data, ())
    changed = True
    while changed:  # generation by generation
        changed = False
        for version in registry:
            known = found.get(version.reference) or ModelUse(version.reference, version.aliases, (), (), ())
            teachers = tuple(
                other.reference
                for other in registry
                if other.weights_sha256
                and other.weights_sha256 == version.parent_sha256
                and other.reference in found
                and found[other.reference].learned
            )
            if teachers != known.teachers:
                found[version.reference] = dataclasses.replace(known, teachers=teachers)
                changed = True
    return [found[version.reference] for version in registry if version.reference in found]
