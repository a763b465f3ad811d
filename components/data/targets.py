"""Decode targets of dense tasks: masks as 8-bit PNG, depth as 16-bit PNG in millimeters or float32 npy in meters.

Targets are as untrusted as images. Size and kind are read from the header, and compared with the image's, before a
pixel is decoded; npy files are read without pickle.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.core.errors import DatasetError
from components.data.pixels import first_line

PNG, NPY = "png", "npy"
PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
GRAY, PALETTE = 0, 3  # color types of PNG
# Color types with bits. Pillow scales gray of fewer bits, so that the values would be others; indices stay.
MASKS = frozenset({(GRAY, 8), (PALETTE, 1), (PALETTE, 2), (PALETTE, 4), (PALETTE, 8)})
DEPTHS = frozenset({(GRAY, 16)})
MILLIMETERS = 1000  # in a meter
MAX_HEADER = 4096  # bytes of an npy header

Size = tuple[int, int]  # width, height


class TargetError(DatasetError):
    """A target cannot be used: `reason` is `format`, `size` or `damaged`, `detail` a sentence for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[TargetError], tuple[str, str]]:
        return TargetError, (self.reason, self.detail)


def decode_mask(data: bytes, kind: str, size: Size) -> NDArray[np.uint8]:
    """Decode a segmentation mask.

    Args:
        data: untrusted encoded bytes.
        kind: `png`; gray, or with a palette, whose indices are the values.
        size: of the image, upright.

    Returns:
        [H, W] pixel values.

    Raises:
        TargetError: another kind of file, another size, or damaged.
    """
    if kind != PNG:
        raise TargetError("format", f"a mask is a PNG with 8 bits, not {kind}")
    return _decode_png(data, size, MASKS, "a mask is a PNG, gray with 8 bits or with a palette")


def decode_depth(data: bytes, kind: str, size: Size) -> NDArray[np.float32]:
    """Decode a depth map as it is stored, with 0 for pixels without depth.

    Args:
        data: untrusted encoded bytes.
        kind: `png`, gray of 16 bits in millimeters; or `npy`, float32 in meters.
        size: of the image, upright.

    Returns:
        [H, W] meters. Values of an npy file may be negative or not finite, which `pedigree evalset check` refuses.

    Raises:
        TargetError: another kind of file, another size, or damaged.
    """
    if kind == NPY:
        return _decode_npy(data, size)
    expected = "depth is a gray PNG with 16 bits in millimeters, or float32 npy in meters"
    return _decode_png(data, size, DEPTHS, expected).astype(np.float32) / np.float32(MILLIMETERS)


def _decode_png(data: bytes, size: Size, allowed: frozenset[tuple[int, int]], expected: str) -> NDArray[np.uint8]:
    if len(data) < len(PNG_HEAD) + 10 or not data.startswith(PNG_HEAD):
        raise TargetError("format", f"{expected}; this begins with {data[:8]!r}")
    width, height, bits, color = struct.unpack_from(">IIBB", data, len(PNG_HEAD))
    if (color, bits) not in allowed:
        raise TargetError("format", f"{expected}; this has {bits} bits and color type {color}")
    _check_size((width, height), size)
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if getattr(image, "is_animated", False):
            raise TargetError("format", f"{expected}; this is animated")
        return np.array(image)
    except TargetError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise TargetError("damaged", f"PNG: {first_line(error)}") from None


def _decode_npy(data: bytes, size: Size) -> NDArray[np.float32]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=MAX_HEADER)
    except Exception as error:  # its parser raises many types on hostile bytes
        raise TargetError("damaged", f"npy: {first_line(error)}") from None
    if dtype != np.float32 or len(shape) != 2:
        raise TargetError("format", f"depth in npy is float32 [H, W] in meters; this is {dtype} {list(shape)}")
    _check_size((shape[1], shape[0]), size)
    if len(data) - stream.tell() != 4 * shape[0] * shape[1]:
        raise TargetError("damaged", f"npy: {len(data) - stream.tell()} bytes for {shape[0] * shape[1]} values")
    stream.seek(0)
    return np.ascontiguousarray(np.load(stream, allow_pickle=False), dtype=np.float32)


def _check_size(found: Size, expected: Size) -> None:
    if found != expected:
        raise TargetError("size", f"{found[0]} x {found[1]} pixels; its image has {expected[0]} x {expected[1]}")
