import hashlib
import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.core.errors import DatasetError
from components.data import shards
from components.data.shards import (
    ImageError,
    ShardReader,
    ShardWriter,
    decode_image,
    open_image,
    shard_starts,
    upright_size,
)

# pytest puts the filters of the module aside.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=(40, 30), mode="RGB", seed=0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def blobs(count: int = 40) -> dict[str, bytes]:
    data = [np.random.default_rng(number).bytes(100 + 37 * number) for number in range(count)]
    return dict(sorted((hashlib.sha256(item).hexdigest(), item) for item in data))


def write(folder: Path, images: dict[str, bytes], max_bytes: int) -> list[tuple[str, str, int, int]]:
    with ShardWriter(folder, max_bytes) as writer:
        places = [(name, *writer.add(name, "jpg", data)) for name, data in images.items()]
    shards = [place[1] for place in places]
    assert shard_starts(map(len, images.values()), max_bytes) == [shards.index(name) for name in sorted(set(shards))]
    return places


# Shards


def test_shards_are_plain_tars_and_offsets_lead_to_the_bytes(tmp_path: Path) -> None:
    images = blobs()
    places = write(tmp_path, images, 30_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:05d}.tar" for number in range(len(names))]
    assert len(names) > 1
    found = {}
    for name in names:
        assert (tmp_path / name).stat().st_size <= 30_000
        assert (tmp_path / name).stat().st_size % 10_240 == 0  # ends as tars do
        with tarfile.open(tmp_path / name, "r:") as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                found[member.name] = archive.extractfile(member).read()
    assert found == {f"{name}.jpg": data for name, data in images.items()}
    reader = ShardReader(tmp_path)
    assert {name: reader.read(shard, offset, length) for name, shard, offset, length in places} == images


def test_equal_images_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", blobs(), 30_000)
    write(tmp_path / "b", blobs(), 30_000)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_image_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    places = write(tmp_path, {"a": b"x", "b": bytes(50_000), "c": b"y"}, 20_000)
    assert [place[1] for place in places] == ["00000.tar", "00001.tar", "00002.tar"]


def test_images_out_of_order_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 10_000) as writer:
        writer.add("b", "jpg", b"1")
        with pytest.raises(DatasetError, match="ascending order"):
            writer.add("b", "jpg", b"1")
        with pytest.raises(DatasetError, match="ascending order"):
            writer.add("a", "jpg", b"1")


@pytest.mark.parametrize("shard", ["../outside.tar", "/etc/passwd", "a/../../outside.tar", ""])
def test_the_reader_does_not_leave_its_root(tmp_path: Path, shard: str) -> None:
    (tmp_path / "outside.tar").write_bytes(bytes(1000))
    (tmp_path / "root").mkdir()
    with pytest.raises(DatasetError, match="does not lie inside"):
        ShardReader(tmp_path / "root").read(shard, 0, 10)


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -1), (995, 6), (2**62, 2**62), (1001, 0)])
def test_the_reader_checks_bounds(tmp_path: Path, offset: int, length: int) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    with pytest.raises(DatasetError, match="not inside its 1000 bytes"):
        ShardReader(tmp_path).read("a.tar", offset, length)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.tar: No such file"):
        ShardReader(tmp_path).read("gone.tar", 0, 1)


def test_threads_share_a_reader_and_few_descriptors(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    images = blobs()
    places = write(tmp_path, images, 2_048)  # a shard for each image
    reader = ShardReader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            read = list(pool.map(lambda place: reader.read(*place[1:]), places))
            assert read == list(images.values())
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_reader_works_after_fork_even_while_its_lock_is_held_and_after_pickling(tmp_path: Path) -> None:
    images = blobs(2)
    (_, *place), _ = write(tmp_path, images, 10**6)
    reader = ShardReader(tmp_path)
    reader.read(*place)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    with reader._lock:
        child = context.Process(target=lambda: send.send_bytes(reader.read(*place)))
        child.start()
    assert receive.poll(20)
    assert receive.recv_bytes() == next(iter(images.values()))
    child.join(20)
    assert pickle.loads(pickle.dumps(reader)).read(*place) == next(iter(images.values()))


# Decoding


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_every_allowed_format_is_decoded_to_rgb(kind: str) -> None:
    image = decode_image(encode(noise(), kind))
    assert (image.mode, image.size, image.format) == ("RGB", (40, 30), kind)
    if kind in {"PNG", "BMP", "TIFF", "PPM"}:
        assert np.array_equal(np.asarray(image), np.asarray(noise()))


def test_exif_rotation_is_undone() -> None:
    upright = noise()
    turns = {
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    for orientation, store in turns.items():  # how a camera stores an upright scene, by the EXIF standard
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(np.asarray(upright))))
        for kind in ("PNG", "TIFF"):  # Pillow turns a TIFF by itself
            data = encode(stored, kind, exif=exif)
            assert np.array_equal(np.asarray(decode_image(data)), np.asarray(upright)), (kind, orientation)
            assert upright_size(open_image(data)) == upright.size, (kind, orientation)


def test_damaged_exif_does_not_lose_the_image() -> None:
    data = encode(noise(), "JPEG")
    block = b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + bytes(8)
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert decode_image(broken).size == (40, 30)


def test_transparency_is_laid_over_white() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (255, 0, 51)  # black, at full, no and a fifth of opacity
    assert np.asarray(decode_image(encode(Image.fromarray(pixels), "PNG")))[0, :, 0].tolist() == [0, 255, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putdata([0, 1])
    decoded = np.asarray(decode_image(encode(palette, "PNG", transparency=1)))
    assert decoded[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_gray_palette_and_cmyk_become_rgb() -> None:
    gray = noise(mode="L")
    assert np.array_equal(np.asarray(decode_image(encode(gray, "PNG"))), np.repeat(np.asarray(gray)[..., None], 3, 2))
    assert decode_image(encode(noise().quantize(16), "PNG")).mode == "RGB"
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = np.asarray(decode_image(encode(cmyk, "TIFF")))[0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60
    assert decode_image(encode(cmyk, "JPEG")).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), kind)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encode(noise((200, 150)), kind)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.reason == "truncated"
    if kind not in {"BMP", "PPM"}:  # theirs begin with letters that a text could begin with
        with pytest.raises(ImageError) as caught:
            decode_image(data[:12])
        assert caught.value.reason == "truncated"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused_and_single_frames_are_not(kind: str) -> None:
    frames = [noise(seed=seed) for seed in range(3)]
    with pytest.raises(ImageError) as caught:
        decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert caught.value.reason == "animated"
    assert decode_image(encode(frames[0], kind, save_all=True)).size == (40, 30)


def test_a_jpeg_with_previews_behind_it_is_a_jpeg() -> None:
    image = decode_image(encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)]))
    assert (image.format, image.size) == ("JPEG", (40, 30))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<!doctype html>", "not_an_image"),
        (bytes(1000), "not_an_image"),
        (b"\x00\x00\x00\x1cftypheic" + bytes(100), "unsupported_format"),
        (b"8BPS\x00\x01" + bytes(100), "unsupported_format"),
        (b"%PDF-1.7\n" + bytes(100), "unsupported_format"),
    ],
)
def test_other_bytes_are_refused_by_what_they_are(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


def test_icons_are_refused_though_pillow_could_read_them() -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(encode(noise((32, 32)), "ICO"))
    assert caught.value.reason == "unsupported_format"


@pytest.mark.parametrize(("side", "limit"), [(12_000, 50_000_000), (60_000, 10**10), (11, 120)])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int, limit: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]  # not even one row
    chunks = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts]
    with pytest.raises(ImageError) as caught:
        decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), max_pixels=limit)
    assert caught.value.reason == "too_many_pixels"


def test_what_ingest_has_admitted_is_opened_by_later_stages() -> None:
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(b)) + k + b + bytes(4) for k, b in ((b"IHDR", header), (b"IDAT", b""))]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    data = data.replace(header + bytes(4), header + struct.pack(">I", zlib.crc32(b"IHDR" + header)))
    assert open_image(data).size == (12_000, 12_000)
    with pytest.raises(ImageError, match="too_many_pixels: 12000 x 12000"):
        open_image(data, max_pixels=shards.MAX_PIXELS)


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded() -> None:
    """A scan of 79 bytes costs a pass over all of 49 million pixels: 1.1 MiB of them took 37 s."""
    data = encode(noise(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert data.count(b"\xff\xda") == 10
    assert decode_image(data[:-2] + 90 * data[last:-2] + data[-2:]).size == (40, 30)
    with pytest.raises(ImageError, match="too_many_scans: 101 scans of the image; at most 100 are decoded"):
        decode_image(data[:-2] + 91 * data[last:-2] + data[-2:])


def test_damaged_bytes_never_raise_anything_but_image_error() -> None:
    generator = np.random.default_rng(0)
    reasons, details = set(), set()
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        data = np.frombuffer(encode(noise(), kind), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            places = generator.integers(0, min(len(data), 400), 4)
            damaged[places] = generator.integers(0, 256, 4)
            try:
                reasons.add(decode_image(damaged.tobytes(), max_pixels=10**6).mode)
            except ImageError as error:
                reasons.add(error.reason)
                details.add(error.detail)
    known = {"truncated", "not_an_image", "too_many_pixels", "animated", "multi_page", "unsupported_format"}
    assert not [detail for detail in details if " at 0x" in detail]
    assert {"RGB", "truncated", "not_an_image"} <= reasons <= {"RGB"} | known


def test_an_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "half")))
    assert (error.reason, error.detail) == ("truncated", "half")
