"""Files that systems and programs leave in folders, archives and buckets: no image of the user's is among them."""

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
    """Files that are no image and are not examined, counted by kind, with an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count files of one kind."""
        if count:
            self.counts[kind] += count
            self.examples.setdefault(kind, example)

    def update(self, other: Ignored) -> None:
        """Add another account to this one."""
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
    """Return what makes a file one to be ignored: the system's name in its path, `._*`, or `hidden`; else None."""
    for part in path.parts:
        if part.startswith("._"):
            return "._*"  # AppleDouble: what macOS keeps of a file on a disk of another system
        if part.lower() in SYSTEM_NAMES or part in {".DS_Store", ".thumbnails", ".ipynb_checkpoints"}:
            return part
        if part.startswith("."):
            return "hidden"
    return None
