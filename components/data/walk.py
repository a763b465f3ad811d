"""List the files of a local folder, each once and in sorted order, following links.

A real folder is always listed under its own name. A link to a folder outside of the tree is followed under the link's
name; of several links to it, the first by name.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from components.core.text import one_line
from components.data.ignored import Ignored, ignored_kind

Identity = tuple[int, int]  # device and inode
GONE = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file below the root folder."""

    relative: str  # decoded as text, as is `uri`
    uri: str
    path: str
    size: int


@dataclass
class Walk:
    """Files below a folder."""

    files: list[LocalFile] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # path, reason, detail
    ignored: Ignored = field(default_factory=Ignored)
    links: set[str] = field(default_factory=set)  # relative paths of followed links to folders
    repeated: list[str] = field(default_factory=list)  # skipped links to files listed under another name
    outside: list[str] = field(default_factory=list)  # links out of the folder, with their targets; followed
    num_outside: int = 0  # files reached by them


def walk(root: str) -> Walk:
    """List all files below a folder.

    Raises:
        OSError: the folder itself cannot be read.
    """
    return _Walker(root).walk()


class _Walker:
    def __init__(self, root: str):
        self._root = root
        self._home = os.path.realpath(root)
        self._seen: set[Identity] = set()  # listed folders, and files reached by links
        self._folder_links: list[str] = []  # relative, as in the next
        self._file_links: list[str] = []
        self.found = Walk()

    def walk(self) -> Walk:
        """List all files, those behind links last."""
        with os.scandir(self._root):
            pass
        self._take_folder("")
        while self._folder_links:  # a folder behind a link may hold links again
            links, self._folder_links = sorted(self._folder_links), []
            for relative in links:
                self._follow(relative)
        for relative in sorted(self._file_links):
            self._follow(relative)
        return self.found

    def _take_folder(self, top: str) -> None:
        folders = [top]
        while folders:
            relative = folders.pop()
            try:
                entries = self._entries(relative)
            except OSError as error:
                self._refuse(relative, "unreadable", f"folder: {error.strerror or error}; its files are missing")
                continue
            for entry in entries:
                name = os.path.join(relative, entry.name)
                if (kind := ignored_kind(PurePosixPath(entry.name))) is not None:
                    self.found.ignored.add(kind, as_text(name), _count_files(entry.path))
                elif entry.is_symlink():
                    (self._folder_links if os.path.isdir(entry.path) else self._file_links).append(name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                else:
                    self._take_file(name)

    def _entries(self, relative: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder; none if it is already listed under another name."""
        path = self._path(relative)
        if not self._is_new(os.stat(path)):
            self.found.repeated.append(as_text(relative))
            return []
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def _take_file(self, relative: str) -> None:
        path = self._path(relative)
        try:
            status = os.stat(path)
        except OSError as error:
            self._refuse(relative, "unreadable", error.strerror or str(error))
            return
        if stat.S_ISREG(status.st_mode):
            self.found.files.append(LocalFile(as_text(relative), as_text(path), path, status.st_size))
        else:
            self._refuse(relative, "special_file", "a pipe, a socket or a device")

    def _follow(self, relative: str) -> None:
        """List the target of a link, unless it is listed under another name."""
        path = self._path(relative)
        try:
            status = os.stat(path)
        except OSError as error:
            reason = {errno.ELOOP: "looping_link"} | dict.fromkeys(GONE, "dangling_link")
            detail = f"a link to {one_line(self._shown(os.readlink(path)))}: {error.strerror or error}"
            self._refuse(relative, reason.get(error.errno or 0, "unreadable"), detail)
            return
        target = os.path.realpath(path)
        if stat.S_ISDIR(status.st_mode) and _is_in(os.path.realpath(os.path.dirname(path)), target):
            self._refuse(relative, "looping_link", f"leads back to {one_line(self._shown(target))}, in which it lies")
        elif self._is_taken(status, target):
            self.found.repeated.append(as_text(relative))
        else:
            before = len(self.found.files)
            if stat.S_ISDIR(status.st_mode):
                self.found.links.add(as_text(relative))
                self._take_folder(relative)
            else:
                self._is_new(status)
                self._take_file(relative)
            if not _is_in(target, self._home):
                self.found.outside.append(f"{as_text(relative)} -> {as_text(target)}")
                self.found.num_outside += len(self.found.files) - before

    def _is_taken(self, status: os.stat_result, target: str) -> bool:
        """Return whether a link's target is already listed, a file also by its folder."""
        if (status.st_dev, status.st_ino) in self._seen:
            return True
        parent = os.stat(os.path.dirname(target))
        return stat.S_ISREG(status.st_mode) and (parent.st_dev, parent.st_ino) in self._seen

    def _is_new(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        new = identity not in self._seen
        self._seen.add(identity)
        return new

    def _path(self, relative: str) -> str:
        return os.path.join(self._root, relative) if relative else self._root

    def _shown(self, target: str) -> str:
        """Return a path for messages: relative if it lies in the root folder, because details are shared."""
        if os.path.isabs(target) and _is_in(os.path.normpath(target), self._home):
            relative = os.path.relpath(target, self._home)
            target = "the folder itself" if relative == "." else relative
        return as_text(target)

    def _refuse(self, relative: str, reason: str, detail: str) -> None:
        self.found.refused.append((as_text(self._path(relative)), reason, detail))


def as_text(path: str) -> str:
    """Return a path as valid text for Parquet; file names may be undecodable."""
    return os.fsencode(path).decode(errors="replace")


def _is_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _count_files(path: str) -> int:
    """Count the files below a folder; 1 for a file or a link."""
    if os.path.islink(path) or not os.path.isdir(path):
        return 1
    return sum(len(names) for _, _, names in os.walk(path))
