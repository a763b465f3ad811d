"""Build a realistic uncurated pool from photographs in installed packages, for a first run without own images.

The pool has tiles of each photograph at several scales, a long-tailed distribution, copies, tiny images and broken
files. A labeled evaluation set comes from a separate region of each photograph, except for a few planted leaks.
`ground_truth.json` lists what was planted; only tests read it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.core.progress import track
from components.core.storage import atomic_dir, write_json

# The photographs of scikit-image are in the public domain or CC0 as far as their sources are stated; the two of
# scikit-learn are CC BY 2.0 by danielbuechele and vultilion.
SAMPLE_LICENSE = "CC0-1.0 AND CC-BY-2.0"

# Most tiles that the pool takes of each photograph: a long tail, as pools from the web have.
PHOTOGRAPHS = {
    "hubble": 560,
    "retina": 360,
    "motorcycle": 220,
    "gravel": 170,
    "astronaut": 150,
    "china": 140,
    "coffee": 140,
    "immunohistochemistry": 140,
    "grass": 120,
    "flower": 100,
    "camera": 90,
    "rocket": 80,
    "chelsea": 70,
    "brick": 60,
    "coins": 50,
    "moon": 40,
    "cell": 24,
    "clock": 16,
    "page": 10,
}
POOL_ONLY = ("cell", "clock", "moon", "page")  # too small or too flat for an evaluation region
EVALUATION_SHARE = 1 / 3  # of each photograph's width, on its right
POOL_WINDOWS = {44: (1.5, 2.0), 96: (0.8, 1.3), 208: (0.5, 0.7)}  # side in pixels -> range of resize factors
EVALUATION_WINDOWS = {40: (1.6, 2.0), 80: (1.0, 1.4)}
STRIDE = 0.7  # of a window: tiles of one scale overlap by at most 30 %
ASPECTS = (0.8, 1.0, 1.25)
MAX_EVALUATION_TILES = 50  # of each photograph
# Flatter tiles (sky, darkness, plain skin) would all look alike: of its 3 × 3 cells, so many must hold something.
MIN_DEVIATION, MIN_CELL_DEVIATION, MIN_CELLS = 9.0, 4.0, 5  # deviations of gray values, of 255
COPIES = {"exact": 40, "re_encoded": 60, "resized": 40}
LEAKS = {"leak_exact": 10, "leak_re_encoded": 10, "leak_resized": 10}
TINY = 15
BOMB_SIDE = 12_000  # pixels: above the decoder's limit, in a file of some kilobytes

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Tile:
    """A crop of a photograph, and its file."""

    photograph: str
    box: Box
    factor: float  # resize
    quality: int  # JPEG
    path: str  # relative to the sample's folder


@dataclass(frozen=True)
class Planted:
    """A planted file of the pool."""

    path: str
    kind: str
    of: str | None  # the file that it copies


def build_sample_pool(folder: Path, seed: int = 0) -> None:
    """Write `pool/<label>/`, `evaluation/{train,test}/<label>/` and `ground_truth.json` atomically.

    Args:
        folder: replaced if it exists.
        seed: equal seeds give equal bytes.
    """
    photographs = load_photographs()
    generator = np.random.default_rng(seed)
    evaluation = [
        tile
        for name, photo in photographs.items()
        if name not in POOL_ONLY
        for tile in _evaluation(name, photo, generator)
    ]
    pool = [tile for name, photo in photographs.items() for tile in _pool(name, photo, generator)]
    with atomic_dir(folder) as staging:
        for tile in track([*evaluation, *pool], "sample pool", len(evaluation) + len(pool)):
            _write(staging / tile.path, _encode(_cut(photographs, tile), "JPEG", quality=tile.quality))
        planted = _plant(staging, pool, evaluation, generator)
        boxes = {tile.path: [tile.photograph, *tile.box] for tile in [*pool, *evaluation]}
        truth = {"seed": seed, "planted": [asdict(item) for item in planted], "boxes": boxes}
        write_json(staging / "ground_truth.json", truth)


def load_photographs() -> dict[str, Image.Image]:
    """Load the photographs, RGB or gray, from installed packages, without downloads."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    loaders: dict[str, Callable[[], Any]] = {
        "hubble": data.hubble_deep_field,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "china": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
    }
    names = [name for name in PHOTOGRAPHS if name not in loaders]
    loaders |= {name: getattr(data, name) for name in names}
    return {name: Image.fromarray(np.asarray(loaders[name]())) for name in PHOTOGRAPHS}


def pool_width(name: str, photo: Image.Image) -> int:
    """Return the width of the pool's region, from the left; the rest is for the evaluation set."""
    return photo.width if name in POOL_ONLY else round(photo.width * (1 - EVALUATION_SHARE))


def _pool(name: str, photo: Image.Image, generator: np.random.Generator) -> Iterator[Tile]:
    region = (0, 0, pool_width(name, photo), photo.height)
    boxes = []
    for side, factors in POOL_WINDOWS.items():
        aspect = float(generator.choice(ASPECTS))
        size = (round(side * aspect**0.5), round(side / aspect**0.5))
        boxes += [(box, factors) for box in _grid(region, size, STRIDE) if textured(photo, box)]
    if len(boxes) > PHOTOGRAPHS[name]:
        chosen = np.sort(generator.choice(len(boxes), PHOTOGRAPHS[name], replace=False))
        boxes = [boxes[index] for index in chosen]
    for number, (box, factors) in zip(generator.permutation(len(boxes)), boxes, strict=True):
        path = f"pool/{name}/{number:05d}.jpg"
        yield Tile(name, box, generator.uniform(*factors), int(generator.integers(82, 96)), path)


def _evaluation(name: str, photo: Image.Image, generator: np.random.Generator) -> Iterator[Tile]:
    """Yield tiles of the held-out region; horizontal bands alternate between train and test, without overlap."""
    left, band = pool_width(name, photo), max(EVALUATION_WINDOWS)
    found: list[tuple[str, Box, tuple[float, float]]] = []
    for number, top in enumerate(range(0, photo.height - band + 1, band)):
        region = (left, top, photo.width, top + band)
        for side, factors in EVALUATION_WINDOWS.items():
            boxes = (box for box in _grid(region, (side, side), 1.0) if textured(photo, box))
            found += [("test" if number % 2 else "train", box, factors) for box in boxes]
    chosen = np.sort(generator.permutation(len(found))[:MAX_EVALUATION_TILES])
    for number, index in enumerate(chosen):
        split, box, factors = found[index]
        path = f"evaluation/{split}/{name}/{number:03d}.jpg"
        yield Tile(name, box, generator.uniform(*factors), int(generator.integers(82, 96)), path)


def _grid(region: Box, size: tuple[int, int], stride: float) -> list[Box]:
    left, top, right, bottom = region
    width, height = size
    return [
        (x, y, x + width, y + height)
        for y in range(top, bottom - height + 1, int(np.ceil(height * stride)))
        for x in range(left, right - width + 1, int(np.ceil(width * stride)))
    ]


def textured(photo: Image.Image, box: Box) -> bool:
    """Return whether most of a crop holds something, in contrast to sky, darkness or plain skin."""
    gray = np.asarray(photo.crop(box).convert("L"), dtype=np.float32)
    if gray.std() < MIN_DEVIATION:
        return False
    cells = [cell for rows in np.array_split(gray, 3) for cell in np.array_split(rows, 3, axis=1)]
    return sum(bool(cell.std() >= MIN_CELL_DEVIATION) for cell in cells) >= MIN_CELLS


def _cut(photographs: dict[str, Image.Image], tile: Tile) -> Image.Image:
    # Cropped before resizing, so that no pixels outside of the box are mixed in.
    return _resize(photographs[tile.photograph].crop(tile.box), tile.factor)


def _resize(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _plant(root: Path, pool: list[Tile], evaluation: list[Tile], generator: np.random.Generator) -> list[Planted]:
    """Write all planted files; each original is used once."""
    originals = [tile for tile in pool if tile.photograph not in POOL_ONLY]
    order = iter([originals[index] for index in generator.permutation(len(originals))])
    leaked = iter([evaluation[index] for index in generator.permutation(len(evaluation))])
    planted = []
    for kind, count in (COPIES | LEAKS).items():
        for number in range(count):
            tile = next(leaked if kind in LEAKS else order)
            suffix = "png" if kind.endswith("re_encoded") and number % 3 == 0 else "jpg"
            path = f"pool/{tile.photograph}/{kind}-{number:03d}.{suffix}"
            _write(root / path, _copy(root / tile.path, kind, suffix))
            planted.append(Planted(path, kind, tile.path))
    for number in range(TINY):
        tile = next(order)
        path = f"pool/{tile.photograph}/icon-{number:03d}.png"
        with Image.open(root / tile.path) as image:
            side = 8 + number % 8
            _write(root / path, _encode(image.resize((side, 15 - number % 5), Image.Resampling.BICUBIC), "PNG"))
        planted.append(Planted(path, "tiny", tile.path))
    return planted + _plant_forms(root, order) + _plant_broken(root, order)


def _copy(original: Path, kind: str, suffix: str) -> bytes:
    if kind.endswith("exact"):
        return original.read_bytes()
    with Image.open(original) as image:
        if kind.endswith("resized"):
            return _encode(_resize(image, 0.7), "JPEG", quality=90)
        return _encode(image, "PNG") if suffix == "png" else _encode(image, "JPEG", quality=55)


def _plant_forms(root: Path, order: Iterator[Tile]) -> list[Planted]:
    """Replace ordinary tiles by valid images in forms that careless decoders get wrong."""
    planted = []
    for kind, suffix in (("grayscale", "png"), ("alpha", "png"), ("exif_rotation", "jpg")):
        tile = next(tile for tile in order if tile.factor <= POOL_WINDOWS[208][1])  # large, sharp views
        path = f"pool/{tile.photograph}/{kind}.{suffix}"
        with Image.open(root / tile.path) as image:
            if kind == "grayscale":
                data = _encode(image.convert("L"), "PNG")
            elif kind == "alpha":
                faded = image.convert("RGBA")
                faded.putalpha(Image.linear_gradient("L").resize(image.size))
                data = _encode(faded, "PNG")
            else:
                exif = Image.Exif()
                exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
                data = _encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=92, exif=exif)
        (root / tile.path).unlink()
        _write(root / path, data)
        planted.append(Planted(path, kind, None))
    return planted


def _plant_broken(root: Path, order: Iterator[Tile]) -> list[Planted]:
    files: list[tuple[str, str, bytes]] = []
    for number in range(3):
        tile = next(order)
        data = (root / tile.path).read_bytes()
        files.append(("truncated", f"pool/{tile.photograph}/half-{number}.jpg", data[: len(data) // 2]))
    page = b"<!doctype html><title>404</title><p>The image that you asked for is gone.</p>\n"
    files.append(("not_an_image", f"pool/{next(order).photograph}/missing.jpg", page))
    files.append(("not_an_image", f"pool/{next(order).photograph}/empty.jpg", b""))
    tile = next(order)
    with Image.open(root / tile.path) as image:
        frames = [image.convert("RGB").rotate(turn).quantize(32) for turn in (0, 90, 180)]
        gif = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    files.append(("animated", f"pool/{tile.photograph}/banner.gif", gif))
    files.append(("too_many_pixels", f"pool/{next(order).photograph}/poster.png", _pixel_bomb(BOMB_SIDE)))
    files.append(("unsupported_format", f"pool/{next(order).photograph}/favicon.ico", _icon()))
    for _, path, data in files:
        _write(root / path, data)
    return [Planted(path, kind, None) for kind, path, _ in files]


def _pixel_bomb(side: int) -> bytes:
    """Return a valid black PNG of side × side pixels: a decompression bomb of a few kilobytes."""
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _icon() -> bytes:
    return _encode(Image.new("RGB", (32, 32), (200, 30, 30)), "ICO", sizes=[(32, 32)])
