"""Tombstones of withdrawn images: files in git, beside the collections, which every ingest obeys.

A tombstone holds hashes and a reason, never an image. For near copies it may hold fingerprints: 256 signs of the lowest
frequencies, which re-encoding and resizing hardly change, and from which no picture can be made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy.fft import dctn

from components.core.config import Config, validate
from components.core.storage import write_json

FOLDER = "withdrawn"  # beside the pool and the evaluation sets
WITHDRAWN = "withdrawn"  # reason of a refusal
SIDE, BAND = 64, 16  # pixels of the reduced picture, and frequencies of it, a side
MAX_DISTANCE = 48  # of 256 signs: copies differ in up to 24, 999 of 1000 pairs of other pictures in 98 and more
MIN_DEVIATION = 3.0  # of 255: a flatter picture has no signs that could tell it from others


class Tombstone(Config):
    """What was withdrawn by one takedown, why, when and by whom; its file is named after the takedown.

    Attributes:
        images: SHA-256 of the encoded bytes, sorted.
        fingerprints: of those images whose near copies are refused too.
    """

    takedown: str = Field(pattern=r"^w-[0-9a-f]{12}$")
    reason: str
    withdrawn_at: datetime
    withdrawn_by: str
    images: tuple[str, ...]
    fingerprints: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write the file into the folder of all tombstones, and return its path."""
        path = folder / f"{self.takedown}.json"
        write_json(path, self.model_dump(mode="json"))
        return path


@dataclass(frozen=True)
class Withdrawn:
    """All tombstones of a checkout.

    Attributes:
        images: image id -> what is told about its withdrawal.
        fingerprints: hexadecimal fingerprint -> likewise.
    """

    images: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)


def tombstone_folder(collection: Path) -> Path:
    """Return the folder of the tombstones that hold for a collection, such as `data/withdrawn` for `data/pool`."""
    return collection.parent / FOLDER


def read_tombstones(folder: Path) -> list[Tombstone]:
    """Read all tombstones, by name.

    Raises:
        ConfigError: a file is not a tombstone, so that it is unknown what it withdraws.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text())
        except ValueError:
            values = None
        found.append(validate(Tombstone, values if isinstance(values, dict) else {}, str(path)))
    return found


def read_withdrawn(folder: Path) -> Withdrawn:
    """Read what all tombstones together withdraw; raises as `read_tombstones`."""
    images: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    for stone in read_tombstones(folder):
        told = f"taken down on {stone.withdrawn_at:%Y-%m-%d} ({stone.takedown}): {stone.reason}"
        images |= dict.fromkeys(stone.images, told)
        fingerprints |= dict.fromkeys(stone.fingerprints, told)
    return Withdrawn(images, fingerprints)


def fingerprint(image: Image.Image) -> str | None:
    """Return 64 hexadecimal digits; None for a picture without structure.

    The perceptual hash pHash (Zauner 2010): signs of the lowest DCT coefficients of the brightness around their median.
    It finds an image that was encoded again or resized; not one that was cropped, mirrored or rotated.
    """
    luma = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    if luma.std() < MIN_DEVIATION:
        return None
    band = np.asarray(dctn(luma, norm="ortho"))[:BAND, :BAND].ravel()
    return np.packbits(band > np.median(band)).tobytes().hex()


class NearCopies:
    """Finds near copies of withdrawn images.

    Args:
        fingerprints: of the withdrawn images.
    """

    def __init__(self, fingerprints: Iterable[str]) -> None:
        self._names = sorted(fingerprints)
        self._signs = _signs(self._names)

    def find(self, image: Image.Image) -> str | None:
        """Return the fingerprint of the nearest withdrawn image if the picture is a near copy of it."""
        if not self._names or (own := fingerprint(image)) is None:
            return None
        distances = np.count_nonzero(self._signs != _signs([own]), axis=1)  # [N]
        nearest = int(distances.argmin())
        return self._names[nearest] if distances[nearest] <= MAX_DISTANCE else None


def _signs(fingerprints: list[str]) -> NDArray[np.uint8]:
    """Return [N, 256] zeros and ones."""
    packed = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8).reshape(-1, BAND * BAND // 8)
    return np.unpackbits(packed, axis=1)
