"""List the images of an untrusted uncompressed tar by offset, without unpacking members."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from components.data.ignored import Ignored, ignored_kind
from components.data.ingest_config import IngestError
from components.data.labels import MemberLabels
from components.data.signatures import ARCHIVE, HEAD_BYTES, IMAGE_NAME, damage, may_be_an_image, signature

MAX_LABEL_BYTES = 1024
KINDS = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}


@dataclass(frozen=True, slots=True)
class Member:
    """A possible image, and where its bytes are in the tar."""

    name: str
    label: str | None
    offset: int
    length: int


@dataclass
class TarListing:
    """Contents of a tar."""

    images: list[Member] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # member ("" for the tar), reason, detail
    ignored: Ignored = field(default_factory=Ignored)
    unused_labels: list[str] = field(default_factory=list)  # members


def list_tar(path: str, uri: str, max_bytes: int) -> TarListing:
    """List possible images by name or first bytes. Members before damage are listed.

    Args:
        path: of the file.
        uri: name in messages.
        max_bytes: larger members are refused.

    Raises:
        IngestError: two labels for one key.
    """
    found, labels = TarListing(), MemberLabels(uri)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(path, "r:", encoding="utf-8", errors="replace") as archive:
                for member in _members(archive, size):
                    _take(found, labels, file, member, size, max_bytes)
        except IngestError:
            raise
        except Exception as error:  # tarfile raises many types on hostile bytes
            found.refused.append(("", *damage(path, error)))
    found.images = [replace(image, label=labels.of(image.name)) for image in found.images]
    found.unused_labels = labels.unused()
    return found


def _take(
    found: TarListing, labels: MemberLabels, file: BinaryIO, member: tarfile.TarInfo, size: int, max_bytes: int
) -> None:
    """Classify one member."""
    if member.isdir():
        return
    unsafe, kind = _unsafe(member, size), ignored_kind(PurePosixPath(member.name))
    if unsafe is not None:
        found.refused.append((member.name, *unsafe))
    elif kind is not None:
        found.ignored.add(kind, member.name)
    elif member.name.lower().endswith(".cls") and member.size <= MAX_LABEL_BYTES:
        labels.add(member.name, _read(file, member, MAX_LABEL_BYTES).decode(errors="replace").strip())
    elif IMAGE_NAME.search(member.name) or may_be_an_image(head := _read(file, member, HEAD_BYTES)):
        if member.size > max_bytes:
            found.refused.append((member.name, "too_large", f"{member.size} bytes; at most {max_bytes} are read"))
        else:
            found.images.append(Member(member.name, None, member.offset_data, member.size))
    elif (is_of := signature(head)) is not None and is_of.reason == ARCHIVE:
        found.refused.append((member.name, ARCHIVE, f"inside an archive: {is_of.detail}"))
    else:
        found.ignored.add(PurePosixPath(member.name).suffix or "no extension", member.name)


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    last = -1
    while (member := archive.next()) is not None:
        if not last < member.offset < size:  # a hostile size can make the reader loop
            raise tarfile.ReadError(f"member {member.name!r} does not follow the one before it")
        last = member.offset
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - tarfile would keep them all in memory
        yield member
    # tarfile treats a damaged header like the end, which would silently drop the rest.
    with Path(str(archive.name)).open("rb") as file:
        file.seek(archive.offset)  # pyright: ignore[reportAttributeAccessIssue]
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged header at byte {archive.offset}")  # pyright: ignore[reportAttributeAccessIssue]


def _unsafe(member: tarfile.TarInfo, size: int) -> tuple[str, str] | None:
    """Return reason and detail if a member must not be read."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or member.size < 0:
        return "unsafe_member", "its name leads out of the archive, or its size is negative"
    if not member.isreg() or member.issparse():
        return "unsafe_member", f"{KINDS.get(member.type, 'a device, a pipe or a sparse file')}; not a plain file"
    if member.offset_data + member.size > size:
        return "truncated", f"the archive ends before its {member.size} bytes"
    return None


def _read(file: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    file.seek(member.offset_data)
    return file.read(min(most, member.size))
