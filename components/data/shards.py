"""Write, read and decode shards: deterministic uncompressed tars of original image bytes, read by offset."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from PIL import Image

from components.core.errors import DatasetError
from components.data.pixels import ImageError, Loaded, check_tiff, explain_tiff, first_line, load_rgb
from components.data.signatures import HEAD_BYTES, UNSUPPORTED, begins_like_an_image, signature

BLOCK = 512  # bytes, the unit of the tar format
RECORD = 20 * BLOCK  # a tar's length is a multiple of this, as POSIX and GNU tar write it
OPEN_SHARDS = 64  # descriptors kept by one reader

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "PPM": "ppm"}
MAX_PIXELS = 50_000_000  # default limit for untrusted images
PIXEL_CEILING = 2**30  # upper bound of the limit; later stages decode all images that ingest admitted
MAX_SCANS = 100  # of a progressive JPEG: each is a pass over the whole image; real files have about 10
EXIF_ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# decode_image says what is wrong with an image; Pillow would warn of large sizes and damaged metadata besides.
# Its own limit is an error at twice this, before plugins reserve memory; `open_image` has the lower one.
Image.MAX_IMAGE_PIXELS = PIXEL_CEILING // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ShardWriter:
    """Writer of `00000.tar`, `00001.tar`, ... with members `<image_id>.<extension>` in sorted order.

    A shard is closed before it would exceed `max_bytes`; a larger image gets its own shard. Members have no times or
    owners, so that equal images give equal bytes. `first` is the number of the first shard, for a writer of one of
    the shards that `shard_starts` lays out.
    """

    def __init__(self, folder: Path, max_bytes: int, first: int = 0):
        if max_bytes < 1:
            raise DatasetError(f"a shard of at most {max_bytes} bytes can hold no image; give a positive size")
        self._folder = folder
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._written = 0  # bytes in the open shard
        self._num_shards = first
        self._last_id = ""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._finish()

    def add(self, image_id: str, extension: str, data: bytes) -> tuple[str, int, int]:
        """Append one image; return its shard's file name, and the offset and length of its bytes.

        Raises:
            DatasetError: ids are not strictly ascending.
        """
        if image_id <= self._last_id:
            raise DatasetError(f"images must be added in ascending order of id: {image_id} came after {self._last_id}")
        self._last_id = image_id
        member = tarfile.TarInfo(f"{image_id}.{extension}")
        member.size = len(data)
        member.mode = 0o644
        header = member.tobuf(tarfile.USTAR_FORMAT)
        if self._file is not None and self._written + _member_bytes(len(data)) + RECORD > self._max_bytes:
            self._finish()
        file = self._file or self._open()
        offset = self._written + len(header)
        file.write(header)
        file.write(data)
        file.write(bytes(-len(data) % BLOCK))
        self._written += _member_bytes(len(data))
        return self._name(), offset, len(data)

    def _name(self) -> str:
        return f"{self._num_shards:05d}.tar"

    def _open(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / self._name()).open("xb")
        self._written = 0
        return self._file

    def _finish(self) -> None:
        assert self._file is not None
        end = 2 * BLOCK  # a tar ends with two empty blocks
        self._file.write(bytes(end + -(self._written + end) % RECORD))
        self._file.close()
        self._file = None
        self._num_shards += 1


def shard_starts(lengths: Iterable[int], max_bytes: int) -> list[int]:
    """Return the indices at which `ShardWriter` begins a shard, for images of these lengths in bytes."""
    starts, written = [], 0
    for place, length in enumerate(lengths):
        if not starts or written + _member_bytes(length) + RECORD > max_bytes:
            starts.append(place)
            written = 0
        written += _member_bytes(length)
    return starts


def _member_bytes(length: int) -> int:
    """Return the size of a file of this length in a tar, with header and padding."""
    return BLOCK + length + -length % BLOCK


class _Descriptor:
    """An open file that closes with its last reference: a thread may still read it when the cache drops it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.number).st_size

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardReader:
    """Reader of images in the shards below `root` by offset; thread-safe, fork-safe and picklable."""

    def __init__(self, root: Path):
        self._root = root
        self._start()

    def __getstate__(self) -> Path:
        return self._root

    def __setstate__(self, root: Path) -> None:
        self.__init__(root)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset` of a shard named relative to the root.

        Raises:
            DatasetError: the shard is missing, lies outside the root, or is shorter than offset + length.
        """
        file = self._descriptor(shard)
        if offset < 0 or length < 0 or offset + length > file.size:
            place = f"bytes {offset} to {offset + length}"
            raise DatasetError(f"{self._root / shard}: {place} are not inside its {file.size} bytes")
        parts = []
        while length > 0:  # one call may return fewer bytes, and at most 2 GiB
            part = os.pread(file.number, length, offset)
            if not part:
                raise DatasetError(f"{self._root / shard}: became shorter while it was read")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _start(self) -> None:
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _descriptor(self, shard: str) -> _Descriptor:
        if self._pid != os.getpid():  # forked: a thread of the parent may have held the lock
            self._start()
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = self._open_shard(shard)
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file

    def _open_shard(self, shard: str) -> _Descriptor:
        # Only names are checked, not link targets: DVC may link a tracked file to its cache.
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DatasetError(f"shard {shard!r} does not lie inside {self._root}")
        try:
            return _Descriptor(self._root / path)
        except OSError as error:
            raise DatasetError(f"{self._root / shard}: {error.strerror or error}") from None


def decode_image(data: bytes, *, max_pixels: int = PIXEL_CEILING) -> Image.Image:
    """Decode an image to RGB, upright by EXIF, with transparency composited over white.

    Args:
        data: untrusted encoded bytes.
        max_pixels: larger images are refused before decoding. Bytes that ingest has not admitted need a limit, such as
            `MAX_PIXELS`.

    Returns:
        An RGB image; its `format` is that of `data`.

    Raises:
        ImageError: reason `truncated` (damaged or cut short), `not_an_image`, `too_many_pixels`, `too_many_scans`,
            `animated` (more than one frame), `multi_page` (TIFF) or `unsupported_format`.
    """
    return load_image(open_image(data, max_pixels=max_pixels))


def decode_noted(data: bytes, *, max_pixels: int) -> Loaded:
    """Decode as `decode_image` does, with notes on what was scaled or dropped."""
    opened = open_image(data, max_pixels=max_pixels)
    notes = check_tiff(opened)
    loaded = _load(opened)
    return Loaded(loaded.image, (*notes, *loaded.notes))


def open_image(data: bytes, *, max_pixels: int = PIXEL_CEILING) -> Image.Image:
    """Parse the header of an encoded image; `load_image` decodes the pixels.

    Raises:
        ImageError: as `decode_image`, for problems visible in the header.
    """
    if not data:
        raise ImageError("not_an_image", "the file is empty")
    image = _open_image(data, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        shown = f"{width} x {height} ({width * height}) pixels"
        raise ImageError("too_many_pixels", f"{shown}; at most {max_pixels} are decoded")
    if image.format in {"JPEG", "MPO"} and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError("too_many_scans", f"{scans} scans of the image; at most {MAX_SCANS} are decoded")
    try:
        check_tiff(image)
        animated = image.format not in {"MPO", "TIFF"} and getattr(image, "is_animated", False)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise ImageError("truncated", f"{image.format}: {first_line(error)}") from None
    if animated:
        raise ImageError("animated", f"{image.format} with more than one frame")
    return image


def load_image(image: Image.Image, *, shrink: float = 1.0) -> Image.Image:
    """Decode an image that `open_image` opened, as `decode_image` does.

    Args:
        image: from `open_image`.
        shrink: allowed reduction; a JPEG is decoded at the smallest of 1/2, 1/4 or 1/8 of its size within it.

    Raises:
        ImageError: as `decode_image`.
    """
    return _load(image, shrink).image


def _load(image: Image.Image, shrink: float = 1.0) -> Loaded:
    name = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with appended previews or a gain map
    try:
        if name == "JPEG" and shrink >= 2:
            factor = max(f for f in (2, 4, 8) if f <= shrink)
            image.draft(None, (image.width // factor, image.height // factor))
        loaded = load_rgb(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("truncated", f"{name}: {first_line(error)}") from None
    turn = _orientation(image)  # after decoding: Pillow rotates TIFFs itself, and metadata may follow the pixels
    upright = loaded.image if turn is None else loaded.image.transpose(turn)
    upright.format = name
    return Loaded(upright, loaded.notes)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image after EXIF rotation."""
    if image.format == "TIFF":  # Pillow rotates these itself, and reports the final size
        return image.size
    sideways = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE)
    sideways += (Image.Transpose.ROTATE_90,)
    width, height = image.size
    return (height, width) if _orientation(image) in sideways else (width, height)


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(
            "too_many_pixels", f"more than {PIXEL_CEILING} pixels; at most {max_pixels} are decoded"
        ) from None
    except Exception as error:  # Pillow's parsers raise many types on hostile bytes
        if (found := signature(data[:HEAD_BYTES])) is not None:
            allowed = f"; allowed: {', '.join(ALLOWED_FORMATS)}" if found.reason == UNSUPPORTED else ""
            raise ImageError(found.reason, found.detail + allowed) from None
        if begins_like_an_image(data[:HEAD_BYTES]):
            unread = explain_tiff(data)
            raise unread or ImageError("truncated", f"begins like an image: {first_line(error)}") from None
        raise ImageError("not_an_image", f"begins with {data[:8]!r}") from None


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes the image upright."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF does not affect the pixels
        return None
    return TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
