"""Report lines of an ingest beside the counts: labels, splits, links, ignored and rejected files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from components.core.text import one_line
from components.data.ingest_config import IngestRequest
from components.data.labels import Placement, label_line, place, placement_lines, untested_line
from components.data.sources import Listing, Refusal

if TYPE_CHECKING:
    from components.data.ingest import Finding

MAX_DETAIL = 400  # characters
MAX_EXAMPLES, EXAMPLES = 6, {"exact_copy": 1}  # of one reason, each with another detail


def label_findings(findings: Sequence[Finding], listing: Listing) -> tuple[list[Finding], Placement, str]:
    """Assign split and label to every finding.

    Returns:
        The findings, the placement by folders, and the origin of the labels.
    """
    images = [finding for finding in findings if finding.reason is None]
    placed = place({finding.folder for finding in images}, listing.links)
    given = any(finding.label is not None for finding in images)
    if given:  # labels in archives take precedence over folders
        placed.labels, placed.wrappers = {}, []
        tables = {"a column of the tables" if batch.row_group is not None else "`.cls` members"
                  for batch in listing.batches}  # fmt: skip
        origin = " and ".join(sorted(tables))
    else:
        origin = f"folder names ({len(placed.links)} are links)" if placed.links else "folder names"
    labeled = [
        replace(
            finding,
            label=finding.label if given else placed.labels.get(finding.folder),
            split=placed.splits.get(finding.folder),
        )
        for finding in findings
    ]
    return labeled, placed, origin


def one_run_lines(images: Sequence[Finding], request: IngestRequest) -> Iterator[str]:
    """Yield a line on images that were given to one run."""
    if request.one_run:
        yield (
            f"source {request.name}: this run takes exactly these {len(images):,} images, and no other run takes them; "
            "`pedigree ingest` adds images permanently"
        )


def label_lines(images: Sequence[Finding], placed: Placement, origin: str, in_the_pool: bool) -> Iterator[str]:
    """Yield lines on labels and splits.

    Args:
        images: distinct images of the source.
        placed: labels and splits by folder.
        origin: of the labels.
        in_the_pool: whether the source, or a part of it, is for training.
    """
    labels = Counter(finding.label for finding in images if finding.label is not None)
    yield label_line(labels, [finding.uri for finding in images if finding.label is None], origin)
    yield from placement_lines(placed)
    splits = Counter(finding.split for finding in images if finding.split is not None)
    if splits:
        yield f"by the folders {splits['train']} images are for training and {splits['test']} for testing"
    if placed.split_names.get("test") and in_the_pool:
        yield (
            "images of all splits go into the pool, where models train on them; to keep test images out, ingest the "
            "folders one by one, those for testing with --evaluation"
        )


def evaluation_lines(
    images: Sequence[Finding], evaluation: Sequence[Finding], copies: Sequence[tuple[Finding, Finding]]
) -> Iterator[str]:
    """Yield lines on classes that cannot be evaluated, and on copies whose label differs from the kept image's."""
    labels = {finding.label for finding in images if finding.label is not None}
    line = untested_line(labels, [(finding.label, finding.split) for finding in evaluation])
    if labels and line is not None:
        yield line
    other = [pair for pair in copies if pair[1].label not in {None, pair[0].label}]
    if other:
        kept, copy = ((one_line(image.uri), one_line(str(image.label))) for image in other[0])
        yield (
            f"{len(other)} copies have another label than the image that is kept, "
            f"for example {kept[0]} (kept, {kept[1]}) and {copy[0]} ({copy[1]})"
        )


def relabeled_lines(relabeled: Sequence[tuple[Finding, str | None]]) -> Iterator[str]:
    """Yield a line on images whose stored label differs from the source's present one."""
    if relabeled:
        image, label = relabeled[0]
        there, here = (one_line(str(name)) for name in (label, image.label))
        yield (
            f"{len(relabeled)} images were there already under another label, which they keep, such as "
            f"{one_line(image.uri)} ({there}, here {here}); to take the new labels, ingest under another --name"
        )


def source_lines(listing: Listing, findings: Sequence[Finding], rejected: Sequence[Finding | Refusal]) -> Iterator[str]:
    """Yield lines on rejected and ignored files, links, and lossy decoding."""
    yield from counted([*listing.notes, *((note, finding.uri) for finding in findings for note in finding.notes)])
    if listing.ignored.counts:
        yield str(listing.ignored)
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, str]] = {}  # reason -> detail -> the first URI
    for finding in rejected:
        reason = str(finding.reason)
        counts[reason] += 1
        shown = examples.setdefault(reason, {})
        if len(shown) < EXAMPLES.get(reason, MAX_EXAMPLES):
            shown.setdefault(finding.detail, finding.uri)
    for reason, count in sorted(counts.items()):
        described = (f"{one_line(uri)}: {one_line(detail, MAX_DETAIL)}" for detail, uri in examples[reason].items())
        yield f"rejected, {reason} {count}, such as {'; '.join(described)}"


def counted(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each note, with the number of its names and the first of them."""
    names: dict[str, list[str]] = {}
    for note, name in notes:
        names.setdefault(note, []).append(name)
    return [f"{note}: {len(found):,}, such as {one_line(min(found))}" for note, found in sorted(names.items())]
