"""How many test images of a set a registered model has seen in training: by hash, and as near copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.core.errors import PedigreeError

if TYPE_CHECKING:
    from components.data.evalset import Evalset
    from components.lineage.seen import Training


@dataclass(frozen=True)
class Contamination:
    """Test images that a model or one that it came from has been trained on.

    Attributes:
        test_images: of the set.
        seen: ids that a training has drawn.
        near: id -> what it is a near copy of, by the embedder of the run; without those of `seen`.
        trainings: that were looked at, such as `models/adapted of pedigree/1`.
        unknown: why the answer is not complete; empty if it is.
    """

    test_images: int
    seen: tuple[str, ...] = ()
    near: Mapping[str, str] | None = None
    trainings: tuple[str, ...] = ()
    unknown: str = ""

    def line(self) -> str:
        """Return the answer in one line."""
        if not self.trainings:
            return f"contamination not known: {self.unknown}"
        near = "near copies not looked for" if self.near is None else f"{len(self.near)} as near copies"
        example = next(iter(self.seen), None) or next(iter(self.near or ()), None)
        told = f"{len(self.seen)} of {self.test_images} test images were trained on, {near}"
        told += f", such as {example[:12]}" if example else ""
        return f"{told} ({', '.join(self.trainings)})" + (f"; not complete: {self.unknown}" if self.unknown else "")


def contamination(reference: str | None, evalset: Evalset, root: Path) -> Contamination:
    """Look for the test images of a set among those that a model's trainings drew.

    Args:
        reference: of a registered model; None: weights that no registry knows.
        evalset: the set.
        root: the checkout.
    """
    from components.lineage.seen import draws_by, read_history

    ids = evalset.tested["image_id"].to_pylist()
    if reference is None:
        return Contamination(len(ids), unknown="no registry knows these weights")
    try:
        history = read_history(reference, root)
        drawn = set().union(*(draws_by(training) for training in history.trainings))
    except PedigreeError as error:
        return Contamination(len(ids), unknown=str(error))
    names = tuple(f"{training.weights} of {training.version}" for training in history.trainings)
    seen = tuple(sorted(drawn & set(ids)))
    unknown = [history.unknown] if history.unknown else []
    try:
        near = _near(evalset, set(ids) - set(seen), drawn, history.trainings[0], root)
    except PedigreeError as error:
        near, unknown = None, [*unknown, str(error)]
    return Contamination(len(ids), seen, near, names, "; ".join(unknown))


def _near(evalset: Evalset, ids: set[str], drawn: set[str], own: Training, root: Path) -> dict[str, str]:
    from components.core.progress import track
    from components.curation.near_copies import copied
    from components.data.shards import ShardReader

    reader = ShardReader(evalset.images.root)
    rows = [row for row in evalset.tested.to_pylist() if row["image_id"] in ids]
    searched = track(rows, "near copies", len(rows))
    images = (reader.read(row["shard"], row["offset"], row["length"]) for row in searched)
    found = zip(rows, copied(images, drawn, own.record, root), strict=True)
    return {row["image_id"]: near.image_id for row, near in found if near is not None}
