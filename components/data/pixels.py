"""Convert opened images to 8-bit RGB: wide samples, channels, pages, transparency.

All decoding uses this module, so that ingest, curation, training, evaluation and a served model see the same pixels.
The conversion depends on the bytes of the image only. Each lossy decision is reported as a note.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from components.core.errors import PedigreeError

SAMPLE_BITS = (8, 10, 12, 14, 16)  # of 16, as used by instruments
BRIGHT_SHARE = 1000  # one in this many pixels may exceed the range, such as dead pixels of a sensor
MAX_PAGES = 32  # of a TIFF; each one takes a pass over its tags
SUBFILE_TYPE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES, EXTRA, KIND = 254, 258, 259, 262, 277, 284, 338, 339
WHITE_IS_ZERO, SEPARATE_PLANES, REDUCED = 0, 2, 1  # values of these tags
# What Pillow says of layouts that it does not read; the last, of more planes than its modes have.
UNREAD = {"unknown pixel mode", "unknown data organization", "string index out of range"}
KINDS = {2: "signed ", 3: "floating-point ", 5: "complex ", 6: "complex "}


class ImageError(PedigreeError):
    """Bytes are not a supported image: `reason` is one word for tables, `detail` a sentence for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.reason, self.detail)


@dataclass(frozen=True)
class Loaded:
    """An image as 8-bit RGB, with notes on what the conversion lost."""

    image: Image.Image
    notes: tuple[str, ...]


def check_tiff(image: Image.Image) -> list[str]:
    """Refuse a TIFF that Pillow misreads; return notes on what is lost of any other.

    Raises:
        ImageError: `multi_page`, or `unsupported_format`.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return []
    tags = image.tag_v2
    wide = max(tags.get(BITS, (1,))) > 8
    if tags.get(PLANES) == SEPARATE_PLANES and wide and image.tile and image.tile[0].codec_name == "raw":
        # Pillow reads the bytes of a plane as 8-bit samples: a wrong picture, without an error.
        raise ImageError("unsupported_format", f"{_tiff_layout(tags)}, uncompressed in planes; save it interleaved")
    if not wide and max(tags.get(KIND, (1,))) in KINDS:
        raise ImageError("unsupported_format", f"{_tiff_layout(tags)}; save it with samples from 0")
    notes = []
    if previews := _count_previews(image):
        notes.append(f"TIFF with {previews + 1} pages: the first is read, the smaller ones are not")
    bands = len(image.getbands())
    if (samples := int(tags.get(SAMPLES, bands))) > bands:
        notes.append(f"TIFF with {samples} channels: {samples - bands} of them not read")
    if image.mode == "RGBA" and EXTRA not in tags:
        notes.append("TIFF with 4 channels of which none is described: the fourth is read as opacity")
    return notes


def explain_tiff(data: bytes) -> ImageError | None:
    """Explain why Pillow cannot open an intact TIFF of an unsupported kind; None for other bytes."""
    if not data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return None
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if b"+" in data[2:4] else 8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        layout = _tiff_layout(tags)
        packed = int(tags.get(COMPRESSION, 1))
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:  # Pillow's error for an invalid file of a format
        if str(error) in UNREAD:
            return ImageError("unsupported_format", f"{layout}; gray and RGB of 8 or 16 bits are read, save it so")
        if packed not in TiffImagePlugin.COMPRESSION_INFO:
            return ImageError("unsupported_format", f"{layout}, compressed by method {packed}; save it with deflate")
    except Exception:  # damaged: Pillow's parsers raise many types
        return None
    return None


def load_rgb(image: Image.Image) -> Loaded:
    """Decode an opened image as RGB, without applying EXIF rotation.

    Raises:
        ImageError: `unsupported_format`.
        Exception: of any type, from Pillow on hostile bytes.
    """
    raw, stream = _raw_mode(image), image.fp  # pyright: ignore[reportAttributeAccessIssue] - of ImageFile
    known = _known_bits(image)
    inverted = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_gray(image, known, inverted=inverted)
    if re.fullmatch(r"(LA|RGB|RGBA|RGBX);16[BLN]", raw):
        return _scale_color(image, raw, stream)
    return Loaded(_lay_over_white(image), ())


def first_line(error: Exception) -> str:
    """Return an error of Pillow in one line, without memory addresses."""
    if isinstance(error, UnidentifiedImageError):  # its message is the repr of the stream
        return "its head cannot be read"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", (str(error) or type(error).__name__).splitlines()[0])


def _lay_over_white(image: Image.Image) -> Image.Image:
    try:
        if image.has_transparency_data:
            pixels = image.convert("RGBA")
            white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, pixels).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy all pixels
    except (ValueError, OSError) as error:
        raise ImageError("unsupported_format", f"{image.mode} pixels: {first_line(error)}") from None


def _scale_gray(image: Image.Image, known: int | None, *, inverted: bool) -> Loaded:
    values = np.asarray(image)  # [H, W]
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 0xFFFF:
        kind = "floating-point" if image.mode == "F" else "signed" if low < 0 else "32-bit"
        detail = f"{kind} gray with values from {low:g} to {high:g}; scale it to whole numbers of 8 or 16 bits"
        raise ImageError("unsupported_format", detail)
    if inverted:
        values = (1 << (known or _bits_of(int(high)))) - 1 - values.astype(np.int32)
    gray, note = _narrow(values, known)
    return Loaded(Image.fromarray(gray).convert("RGB"), (note,))


def _scale_color(image: Image.Image, raw: str, stream: io.BytesIO) -> Loaded:
    """Scale 16-bit samples, of which Pillow decodes the upper 8 bits."""
    upper = np.asarray(image)  # [H, W, C]
    if upper[..., :3].max() >= 1 << (SAMPLE_BITS[-2] - 8):
        return Loaded(_lay_over_white(image), (_note(16),))
    wide = upper.astype(np.uint16) << 8 | _lower_bytes(image, raw, stream)
    color, note = _narrow(wide[..., :3], None)
    if wide.shape[2] == 4:
        color = np.concatenate([color, _narrow(wide[..., 3:], None)[0]], axis=2)
    return Loaded(_lay_over_white(Image.fromarray(color)), (note,))


def _lower_bytes(image: Image.Image, raw: str, stream: io.BytesIO) -> NDArray[np.uint8]:
    """Return the lower 8 of 16 bits, [H, W, C], by decoding with the opposite byte order."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PLANES) == SEPARATE_PLANES:
        detail = f"{_tiff_layout(image.tag_v2)} of which {SAMPLE_BITS[-2]} or fewer are used, in planes"
        raise ImageError("unsupported_format", f"{detail}; save it interleaved")  # libtiff converts to native order
    native, other = ("L", "B") if sys.byteorder == "little" else ("B", "L")
    order = {native: other, other: native, "N": other}[raw[-1]]
    swapped = "RGBA" if raw.startswith("LA") else raw[:-1] + order  # gray and alpha: four bytes as stored
    stream.seek(0)
    again = Image.open(stream, formats=[str(image.format)])
    assert isinstance(again, type(image))
    tiles = again.tile  # pyright: ignore[reportAttributeAccessIssue] - of ImageFile
    rest = [() if isinstance(tile.args, str) else (tile.args or ())[1:] for tile in tiles]
    tiles[:] = [t._replace(args=(swapped, *more) if more else swapped) for t, more in zip(tiles, rest, strict=True)]
    again.load()
    pixels = np.asarray(again)
    return pixels[..., [1, 1, 1, 3]] if raw.startswith("LA") else pixels


def _narrow(values: NDArray[np.integer], known: int | None) -> tuple[NDArray[np.uint8], str]:
    """Return the upper 8 of the used bits of each sample, and a note on it."""
    bits = known or _bits_of(int(values.max()))
    share = values.size / BRIGHT_SHARE
    if known is None and np.count_nonzero(values >= 1 << (bits - 4)) < share:  # almost black except for a few pixels
        bits = next(b for b in SAMPLE_BITS if np.count_nonzero(values >= 1 << b) < share)
    return np.minimum(values >> (bits - 8), 255).astype(np.uint8), _note(bits)


def _bits_of(highest: int) -> int:
    return next(bits for bits in SAMPLE_BITS if highest < 1 << bits)


def _note(bits: int) -> str:
    return f"samples of 16 bits of which {bits} are used: scaled from these to 8 bits"


def _raw_mode(image: Image.Image) -> str:
    """Return the raw mode by which Pillow unpacks the samples."""
    tiles = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _known_bits(image: Image.Image) -> int | None:
    """Return the number of significant bits of wide gray samples, if the file states it."""
    tiles = getattr(image, "tile", [])
    if tiles and tiles[0].codec_name in {"ppm", "ppm_plain"} and tiles[0].args[1] != 0xFFFF:
        return 16  # Pillow scales from the file's maximum value to 16 bits
    return 12 if _raw_mode(image) == "I;12" else None


def _count_previews(image: TiffImagePlugin.TiffImageFile) -> int:
    """Return the number of further pages, if all are reduced copies of the first.

    Raises:
        ImageError: a page is not a reduced copy.
    """
    if not getattr(image, "is_animated", False):
        return 0
    size, previews = image.size, 0
    try:
        for page in count(1):
            image.seek(page)
            half = all(2 * small <= large + 1 for small, large in zip(image.size, size, strict=True))
            if page == MAX_PAGES or not (half or image.tag_v2.get(SUBFILE_TYPE, 0) & REDUCED):
                raise ImageError("multi_page", f"TIFF with {_num_pages(image)} pages; save each as a file of its own")
            previews = page
    except EOFError:
        image.seek(0)
    except ImageError:
        raise
    except Exception as error:  # an unreadable page may not be a preview
        raise ImageError("multi_page", f"TIFF with pages that cannot be read: {first_line(error)}") from None
    return previews


def _num_pages(image: TiffImagePlugin.TiffImageFile) -> str:
    for page in range(MAX_PAGES + 1):
        try:
            image.seek(page)
        except EOFError:
            return str(page)
        except Exception:
            break
    return f"more than {page}"


def _tiff_layout(tags: TiffImagePlugin.ImageFileDirectory_v2) -> str:
    """Describe a layout, such as `TIFF of 5 channels of 16 bits`."""
    bits = tags.get(BITS, (1,))
    samples = int(tags.get(SAMPLES, len(bits)))
    kind = KINDS.get(max(tags.get(KIND, (1,))), "")
    shown = " and ".join(str(b) for b in sorted(set(bits)))
    return f"TIFF of {samples} channel{'s' if samples > 1 else ''} of {shown} {kind}bits"
