"""Metadata files that operating systems and programs leave in folders, archives and buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from components.core.text import one_line

SYSTEM_NAMES = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
        "__macosx",
        *("@eadir", "@tmp", "#recycle", "#snapshot"),  # Synology; the first holds thumbnails
        *("@__thumb", "@recycle", "@recently-snapshot"),  # QNAP
        "lost+found",
    }
)

SHOWN_KINDS = 8


@dataclass
class Ignored:
    """Counts of ignored files by kind, with an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count files of one kind."""
        if count:
            self.counts[kind] += count
            self.examples.setdefault(kind, example)

    def update(self, other: Ignored) -> None:
        """Add the counts of another instance."""
        for kind, count in other.counts.items():
            self.add(kind, other.examples[kind], count)

    def __str__(self) -> str:
        kinds = [
            f"{one_line(kind, 40)} {count} (such as {one_line(self.examples[kind])})"
            for kind, count in self.counts.most_common(SHOWN_KINDS)
        ]
        more = len(self.counts) - len(kinds)
        others = [f"{more} other kinds"] if more else []
        return f"{self.counts.total()} files ignored: {', '.join(kinds + others)}"


def ignored_kind(path: PurePosixPath) -> str | None:
    """Return why a file is ignored: a system name in its path, `._*`, or `hidden`; else None."""
    for part in path.parts:
        if part.startswith("._"):
            return "._*"  # AppleDouble: metadata of macOS on foreign file systems
        if part.lower() in SYSTEM_NAMES or part in {".DS_Store", ".thumbnails", ".ipynb_checkpoints"}:
            return part
        if part.startswith("."):
            return "hidden"
    return None
