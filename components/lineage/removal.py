"""One kind of things that `pedigree gc` removes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.core.storage import StorageError


@dataclass(frozen=True)
class Removal:
    """Things of one kind that go.

    Attributes:
        kind: such as `objects on S3`.
        found: what goes: name -> bytes that its removal frees.
        left: bytes of this kind that stay.
        carry_out: removes them; what is gone already is no error.
    """

    kind: str
    found: Mapping[str, int]
    left: int
    carry_out: Callable[[], None]

    @property
    def freed(self) -> int:
        """Bytes that it frees."""
        return sum(self.found.values())


def files(folder: Path) -> Iterator[os.stat_result]:
    """Facts of all files below a folder; links are not followed, and what vanishes meanwhile is left out."""
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(where, name))
            except FileNotFoundError:
                continue


def own_bytes(folder: Path) -> int:
    """Bytes that deleting a folder frees: not those of files that are also in the DVC cache, as hard links."""
    return sum(facts.st_size for facts in files(folder) if facts.st_nlink == 1)


def disk_bytes(*folders: Path) -> int:
    """Bytes that folders take on the disk, a file with several names counted once."""
    seen = {(f.st_dev, f.st_ino): f.st_blocks * 512 for folder in folders for f in files(folder)}
    return sum(seen.values())


def last_write(path: Path) -> float:
    """When a file, or any below a folder, was last written, in seconds since 1970."""
    return max(facts.st_mtime for facts in [*files(path)] or [path.lstat()])


def last_use(path: Path) -> float:
    """When a file, or any below a folder, was last written or read (as far as the disk notes that)."""
    return max(max(facts.st_mtime, facts.st_atime) for facts in [*files(path)] or [path.lstat()])


def delete(path: Path) -> None:
    """Delete a file or folder; one that is gone is no error.

    Raises:
        StorageError: the system refuses.
    """
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"{path}: not deleted ({error.strerror}); `pedigree gc` again goes on") from error
