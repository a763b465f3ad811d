"""Removals that `pedigree gc` plans, and file helpers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.core.storage import StorageError


@dataclass(frozen=True)
class Removal:
    """Planned removal of one kind of things.

    Attributes:
        kind: such as `objects on S3`.
        found: name -> bytes freed by its removal.
        left: bytes of this kind that are kept.
        carry_out: removes them; ignores what is already gone.
    """

    kind: str
    found: Mapping[str, int]
    left: int
    carry_out: Callable[[], None]

    @property
    def freed(self) -> int:
        """Total bytes freed."""
        return sum(self.found.values())


def files(folder: Path) -> Iterator[os.stat_result]:
    """Yield the status of all files below a folder, without following links; skip files deleted meanwhile."""
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(where, name))
            except FileNotFoundError:
                continue


def own_bytes(folder: Path) -> int:
    """Return the bytes that deleting a folder frees, without files hard-linked to the DVC cache."""
    return sum(facts.st_size for facts in files(folder) if facts.st_nlink == 1)


def disk_bytes(*folders: Path) -> int:
    """Return the disk usage of folders, counting hard-linked files once."""
    seen = {(f.st_dev, f.st_ino): f.st_blocks * 512 for folder in folders for f in files(folder)}
    return sum(seen.values())


def last_write(path: Path) -> float:
    """Return the last write time of a file, or of any file below a folder, in seconds since 1970."""
    return max(facts.st_mtime for facts in [*files(path)] or [path.lstat()])


def last_use(path: Path) -> float:
    """Return the last write or access time (if recorded by the file system) of a file or of files below a folder."""
    return max(max(facts.st_mtime, facts.st_atime) for facts in [*files(path)] or [path.lstat()])


def delete(path: Path) -> None:
    """Delete a file or folder, if it exists.

    Raises:
        StorageError: the system refused.
    """
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"{path}: not deleted ({error.strerror}); run `pedigree gc` again") from error
