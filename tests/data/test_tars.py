import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from components.data.ingest_config import IngestError
from components.data.shards import ImageError, open_image
from components.data.signatures import may_be_an_image, signature
from components.data.tars import TarListing, list_tar

JPEG = b"\xff\xd8\xff\xe0"
TINY_TAR = b"a.jpg".ljust(257, b"\0") + b"ustar".ljust(255, b"\0") + bytes(1024)


def listed(folder: Path, members: Mapping[str, bytes], mode: str = "w", most: int = 10_000) -> TarListing:
    path = folder / "x.tar"
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return list_tar(str(path), "x.tar", most)


def test_members_are_images_by_name_or_by_content(tmp_path: Path) -> None:
    images = {"a.JPG": b"?", "b.jfif": b"?", "c": JPEG, "d.img": b"RIFF1234WEBP", "e.txt": b"\x89PNG\r\n\x1a\n"}
    others = {"f.json": b"{}", "g.json": b"{}", "h": b"text", "i.wav": b"RIFF1234WAVE"}
    system = {"./._a.jpg": b"\0\5\x16\7", "@eaDir/a.jpg": JPEG, ".DS_Store": b""}
    found = listed(tmp_path, images | others | system | {"big.jpg": JPEG + bytes(20_000)})
    assert [member.name for member in found.images] == list(images)
    assert found.ignored.counts == {".json": 2, "no extension": 1, ".wav": 1, "._*": 1, "@eaDir": 1, ".DS_Store": 1}
    assert found.refused == [("big.jpg", "too_large", "20004 bytes; at most 10000 are read")]


@pytest.mark.parametrize(("data", "what"), [(TINY_TAR, "tar"), (b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "ZIP")])
def test_archives_in_archives_are_told(tmp_path: Path, data: bytes, what: str) -> None:
    ((name, reason, detail),) = listed(tmp_path, {"part.bin": data}).refused
    assert (name, reason) == ("part.bin", "archive")
    assert detail.startswith("inside an archive: ")
    assert what in detail


@pytest.mark.parametrize(("mode", "what"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_is_to_be_uncompressed(tmp_path: Path, mode: str, what: str) -> None:
    ((name, reason, detail),) = listed(tmp_path, {"a.jpg": JPEG}, mode).refused
    assert (name, reason) == ("", "archive")
    assert detail.startswith(f"{what}; compressed archives are not read: unpack it")


def test_a_pointer_or_a_page_in_the_place_of_a_tar_is_told(tmp_path: Path) -> None:
    for data, reason in (
        (b"version https://git-lfs.github.com/spec/v1\n", "git_lfs_pointer"),
        (b"<html>", "not_an_image"),
    ):
        (tmp_path / "x.tar").write_bytes(data)
        assert [found[:2] for found in list_tar(str(tmp_path / "x.tar"), "x.tar", 100).refused] == [("", reason)]
    (tmp_path / "x.tar").write_bytes(TINY_TAR[:300] + b"?" * 1000)
    ((_, reason, _),) = list_tar(str(tmp_path / "x.tar"), "x.tar", 100).refused
    assert reason == "damaged_archive"


def test_two_labels_for_a_key_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a.jpg", JPEG), ("a.cls", b"cat\n"), ("a.cls", b"dog")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(IngestError, match=r"two labels for the key a: 'cat' and 'dog'; correct its `\.cls` members"):
        list_tar(str(tmp_path / "x.tar"), "x.tar", 100)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"RIFF\x24\0\0\0WAVEfmt ", "not_an_image", "RIFF WAVE: sound, no image"),
        (b"RIFF\x24\0\0\0AVI LIST", "not_an_image", "RIFF AVI: video, no image"),
        (b"RIFF\x24\0\0\0ACON", "not_an_image", "RIFF of kind b'ACON'"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "truncated", "begins like an image"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "unsupported_format",
            "HEIC, .*convert it to JPEG or PNG.*allowed: JPEG",
        ),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1", "unsupported_format", "AVIF; convert"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom", "not_an_image", "video or sound"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git_lfs_pointer", "a git LFS pointer; `git lfs pull`"),
        (b"\x1f\x8b\x08\0", "archive", "gzip; compressed archives are not read"),
        (TINY_TAR, "archive", "a tar archive; extract it"),
        (b"\n<!DOCTYPE html><html>404", "not_an_image", "an HTML page"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "not_an_image", "AppleDouble"),
        (b"text", "not_an_image", "begins with b'text"),
    ],
)
def test_what_is_no_image_has_a_fitting_reason(data: bytes, reason: str, detail: str) -> None:
    with pytest.raises(ImageError, match=f"^{reason}: {detail}") as caught:
        open_image(data + bytes(30))
    assert caught.value.reason == reason
    assert may_be_an_image(data) == (signature(data) is None and reason == "truncated")
