"""Labels and splits of images from folder names and from `.cls` members of archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from components.core.text import one_line, some_of
from components.data.ingest_config import IngestError

TRAIN, TEST = "train", "test"
_SPLIT = re.compile(r"(?P<train>train|training)|val|valid|validation|dev|eval|evaluation|test|testing", re.IGNORECASE)
_SUFFIX = re.compile(r"[-_ ]?(set|data|split|images?|\d{4})$", re.IGNORECASE)  # test_set, train2017
SHOWN_CLASSES = 20


def split_of(name: str) -> str | None:
    """Return the split that a folder name denotes, `train`, or `test` for all other splits; None for other names."""
    found = _SPLIT.fullmatch(name) or _SPLIT.fullmatch(_SUFFIX.sub("", name))
    return None if found is None else TRAIN if found["train"] else TEST


@dataclass
class Placement:
    """Labels and splits by folder of a source."""

    labels: dict[str, str | None]  # folder -> label
    splits: dict[str, str | None]  # folder -> train, test
    wrappers: list[str] = field(default_factory=list)  # folders that contain all classes
    split_names: dict[str, set[str]] = field(default_factory=dict)  # split -> names of its folders
    beside: set[str] = field(default_factory=set)  # folders with images beside the split folders
    links: set[str] = field(default_factory=set)  # labels from names of links


def place(folders: Collection[str], links: Collection[str] = ()) -> Placement:
    """Derive labels and splits from the folders that contain images.

    A single top folder is no class. Folders with split names are splits if there is no other folder beside them, or if
    both a train and a test split exist. Of the remaining path, two or more sibling folders are classes.

    Args:
        folders: paths relative to the source, such as `train/cat/cam1`; "" for images at the top.
        links: paths that are links.
    """
    parts = {folder: PurePosixPath(folder).parts for folder in sorted(folders)}
    rest = dict(parts)
    placed = Placement(dict.fromkeys(parts), dict.fromkeys(parts))
    while tops := {names[0] for names in rest.values() if names}:
        named = {top: split for top in tops if (split := split_of(top)) is not None}
        if named.keys() == tops or len(set(named.values())) == 2:
            placed.beside |= tops - named.keys()
            for folder, names in rest.items():
                if names and (split := named.get(names[0])) is not None:
                    placed.splits[folder] = split
                    placed.split_names.setdefault(split, set()).add(names[0])
                rest[folder] = names[1:] if names and names[0] in named else ()
        elif len(tops) == 1:
            placed.wrappers += tops
            rest = {folder: names[1:] for folder, names in rest.items()}
        else:
            break
    for folder, names in rest.items():
        if names:
            placed.labels[folder] = names[0]
            if "/".join(parts[folder][: len(parts[folder]) - len(names) + 1]) in links:
                placed.links.add(names[0])
    labeled = [folder for folder, label in placed.labels.items() if label is not None] or list(parts)
    if not {TRAIN, TEST} <= {placed.splits[folder] for folder in labeled}:  # a single split is not a split
        placed.splits = dict.fromkeys(parts)
    return placed


def placement_lines(placed: Placement) -> Iterator[str]:
    """Yield lines for the user on folders that are not classes."""
    if placed.wrappers:
        above = "/".join(one_line(name) for name in placed.wrappers)
        if any(placed.labels.values()):
            yield f"all other folders are in {above}: labels are read below it"
        else:
            yield f"all images in folders are in {above}: no labels, because one class needs at least one other"
    names = {split: some_of(sorted(taken), 6) for split, taken in sorted(placed.split_names.items(), reverse=True)}
    if names:
        taken = "; ".join(f"{name} as {split}" for split, name in names.items())
        yield f"folders taken as splits, not as classes: {taken}"
        if not any(placed.splits.values()):
            yield "only one split has images (labeled ones, where there are labels), so it is not used as a split"
    if placed.beside:
        yield f"images of {some_of(sorted(placed.beside))} have no label: these folders are siblings of the splits"
    if odd := sorted({label for label in placed.labels.values() if label and split_of(label)}):
        yield f"{some_of(odd)}: the name of a split, taken as a class because of its sibling folders"


def label_line(counts: Mapping[str, int], unlabeled: Sequence[str], origin: str) -> str:
    """Describe the labels, their origin, and how many images have none.

    Args:
        counts: label -> images.
        unlabeled: images without label.
        origin: of the labels, such as `folder names`.
    """
    bare = f"{len(unlabeled)} images without label"
    if not counts:
        return f"labels: none; {bare}"
    if unlabeled:
        bare += f", for example {one_line(unlabeled[0])}"
    few_first = sorted(counts, key=lambda label: (counts[label], label))
    shown = sorted(counts) if len(counts) <= SHOWN_CLASSES else few_first[:SHOWN_CLASSES]
    listed = ", ".join(f"{one_line(label)} {counts[label]}" for label in shown)
    if len(counts) > len(shown):
        listed = f"those with the fewest images: {listed}; up to {max(counts.values())} in one"
    return f"labels from {origin}, {len(counts)} classes: {listed}; {bare}"


def untested_line(labels: Collection[str], members: Sequence[tuple[str | None, str | None]]) -> str | None:
    """Describe classes that cannot be evaluated; None if there are none.

    Args:
        labels: all classes of the source.
        members: label and split of each of its images in the evaluation set.
    """
    if not members:
        return "no image is held out, so none of these classes is evaluated (--holdout 0.2 holds a fifth out)"
    counts = Counter(members)
    poor = sorted(label for label in labels if not (counts[label, TRAIN] and counts[label, TEST]))
    if not poor:
        return None
    described = some_of([f"{label} ({counts[label, TRAIN]} train, {counts[label, TEST]} test)" for label in poor], 10)
    return (
        f"{len(poor)} of {len(labels)} classes cannot be evaluated, for each needs a train and a test image in the "
        f"evaluation set: {described}"
    )


class MemberLabels:
    """Labels of one archive in WebDataset format: `KEY.cls` holds the label of the images `KEY.*`."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._labels: dict[str, str] = {}
        self._used: set[str] = set()

    def add(self, member: str, text: str) -> None:
        """Add the text of a `.cls` member.

        Raises:
            IngestError: its key already has another label.
        """
        key = member.rpartition(".")[0]
        if self._labels.setdefault(key, text) != text:
            labels = f"{self._labels[key][:80]!r} and {text[:80]!r}"
            raise IngestError(f"{self._archive}: two labels for the key {key}: {labels}; correct its `.cls` members")

    def of(self, member: str) -> str | None:
        """Return the label of an image, by the longest prefix of its name that has one.

        WebDataset ends a key at the first dot after the last slash, but keys of handmade archives contain dots
        (`shot.00.jpg` beside `shot.00.cls`).
        """
        folder, slash, name = member.rpartition("/")
        parts = name.split(".")
        for end in range(max(1, len(parts) - 1), 0, -1):
            if (key := folder + slash + ".".join(parts[:end])) in self._labels:
                self._used.add(key)
                return self._labels[key] or None
        return None

    def unused(self) -> list[str]:
        """Return the `.cls` members that match no image."""
        return [f"{key}.cls" for key in sorted(self._labels.keys() - self._used)]
