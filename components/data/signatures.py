"""Identify files that cannot be decoded, by their first bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 512  # enough for all signatures; a tar's is at byte 257

IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|a?png|webp|bmp|dib|tiff?|gif|p[pgbn]m|hei[cf]|avif|ico|jp2|jxl|psd|svg)$", re.IGNORECASE
)
ARCHIVE_NAME = re.compile(r"\.(t?gz|tbz2?|bz2|txz|xz|t?zst|zip|7z|rar)$", re.IGNORECASE)
UNSUPPORTED, NO_IMAGE, ARCHIVE, POINTER = "unsupported_format", "not_an_image", "archive", "git_lfs_pointer"
CONVERT = "convert it to JPEG or PNG first"
EXTRACT = "extract it and ingest what was in it as a source of its own"
UNCOMPRESS = (
    "compressed archives are not read: unpack it, or uncompress a .tar.gz to a .tar (`gunzip`), then ingest that"
)


@dataclass(frozen=True)
class Signature:
    """A kind of file: `reason` is one word for tables, `detail` a sentence for people."""

    reason: str
    detail: str


# First bytes of the formats that we read (WebP is told by its RIFF form): what begins so and fails is a damaged image.
_ALLOWED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")
_BITMAPS = (b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")  # so short that text may match

# (place, first bytes, what it is, reason, advice)
_OTHERS = (
    (0, b"8BPS", "PSD", UNSUPPORTED, CONVERT),
    (0, b"\x00\x00\x01\x00", "ICO", UNSUPPORTED, CONVERT),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000", UNSUPPORTED, CONVERT),
    (0, b"\xff\x0a", "JPEG XL", UNSUPPORTED, CONVERT),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL", UNSUPPORTED, CONVERT),
    (0, b"v/1\x01", "OpenEXR", UNSUPPORTED, CONVERT),
    (0, b"DDS ", "DDS", UNSUPPORTED, CONVERT),
    (0, b"%!PS", "PostScript", UNSUPPORTED, CONVERT),
    (0, b"%PDF", "PDF", UNSUPPORTED, CONVERT),
    (0, b"<svg", "SVG", UNSUPPORTED, CONVERT),
    (0, b"version https://git-lfs", "a git LFS pointer", POINTER, "`git lfs pull` fetches the file that it stands for"),
    (0, b"\x1f\x8b", "gzip", ARCHIVE, UNCOMPRESS),
    (0, b"BZh", "bzip2", ARCHIVE, UNCOMPRESS),
    (0, b"\xfd7zXZ\x00", "xz", ARCHIVE, UNCOMPRESS),
    (0, b"\x28\xb5\x2f\xfd", "zstd", ARCHIVE, UNCOMPRESS),
    (0, b"PK\x03\x04", "a ZIP archive", ARCHIVE, EXTRACT),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", ARCHIVE, EXTRACT),
    (0, b"Rar!\x1a\x07", "a RAR archive", ARCHIVE, EXTRACT),
    (257, b"ustar", "a tar archive", ARCHIVE, EXTRACT),
    (0, b"PAR1", "a Parquet file", ARCHIVE, EXTRACT),
    (0, b"\x00\x05\x16\x07", "AppleDouble", NO_IMAGE, "what macOS keeps of a file on a disk of another system"),
    (0, b"ID3", "MP3", NO_IMAGE, "sound"),
    (0, b"fLaC", "FLAC", NO_IMAGE, "sound"),
    (0, b"OggS", "Ogg", NO_IMAGE, "sound or video"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM", NO_IMAGE, "video"),
)
_RIFF = {b"WAVE": "RIFF WAVE: sound", b"AVI ": "RIFF AVI: video"}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"miaf")
_HTML = (b"<!doctype html", b"<html")


def begins_like_an_image(head: bytes) -> bool:
    """Return whether a file begins like a supported image format."""
    return head.startswith(_ALLOWED) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def may_be_an_image(head: bytes) -> bool:
    """Return whether a file, whatever its name, may be an image."""
    return begins_like_an_image(head) or head.startswith(_BITMAPS)


def signature(head: bytes) -> Signature | None:
    """Identify an unsupported file by its first `HEAD_BYTES`; return None if they match nothing."""
    if head[:4] == b"RIFF" and head[8:12] != b"WEBP":
        return Signature(NO_IMAGE, _RIFF.get(head[8:12], f"RIFF of kind {head[8:12]!r}") + ", no image")
    if head[4:8] == b"ftyp":
        return _of_media_container(head)
    for place, magic, name, reason, advice in _OTHERS:
        if head[place : place + len(magic)] == magic:
            return Signature(reason, f"{name}; {advice}")
    if head.lstrip()[:14].lower().startswith(_HTML):
        return Signature(NO_IMAGE, "an HTML page, such as a server's answer in the place of a file; fetch it again")
    return None


def damage(path: str, error: Exception) -> tuple[str, str]:
    """Return reason and detail for an unreadable archive: it is damaged, or another kind of file."""
    with Path(path).open("rb") as file:
        head = file.read(HEAD_BYTES)
    found = signature(head)
    if found is not None and head[257:262] != b"ustar" and not head.startswith(b"PAR1"):
        return found.reason, found.detail
    return "damaged_archive", (str(error) or type(error).__name__).splitlines()[0]


def _of_media_container(head: bytes) -> Signature:
    """Distinguish HEIC, AVIF and video, which all begin with an ISO `ftyp` box that lists brands."""
    brand, brands = head[8:12], head[8 : max(12, int.from_bytes(head[:4], "big"))]
    if brand in {b"avif", b"avis"} or (brand in _HEIC and b"avif" in brands):
        return Signature(UNSUPPORTED, f"AVIF; {CONVERT}")
    if brand in _HEIC:
        return Signature(UNSUPPORTED, f"HEIC, as iPhones save photographs; {CONVERT}")
    if brand == b"crx ":
        return Signature(UNSUPPORTED, f"CR3, raw data of a camera; {CONVERT}")
    return Signature(NO_IMAGE, f"video or sound (ISO media of brand {brand!r}), no image")
