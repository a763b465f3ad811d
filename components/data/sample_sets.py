"""Evaluation sets of four tasks for the sample, from photographs in installed packages.

All images come from the right third of the photographs, of which the sample pool holds nothing but its planted leaks.
Where a set has a train and a test split, their tiles lie in the upper and the lower part of that region, or on its left
and right, with a gap between. Each set is a folder for `pedigree evalset add`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from components.core.storage import atomic_dir
from components.data.evalset_config import EvalsetConfig
from components.data.sample_pool import POOL_ONLY, SAMPLE_LICENSE, load_photographs, pool_width, textured

Box = tuple[int, int, int, int]  # left, top, right, bottom
Pixels = NDArray[np.uint8]  # [H, W, 3]

SPLIT_SHARE = 0.4  # of the region's height or width, for train and for test; the rest is the gap
SIDE = 96  # pixels of a stored image

# Photographs that show the same kind of thing in the upper and in the lower part of their region.
CLASSES = ("brick", "coins", "grass", "gravel", "hubble", "immunohistochemistry", "retina", "rocket")
TILE_SIDES = (48, 64)  # pixels in the photograph
TRAIN_TILES, TEST_TILES = 18, 14  # of each photograph, at most
TILE_STRIDE = 1 / 3  # of a tile's side: tiles of one part may overlap
DARK, BRIGHT = (1.6, 2.4), (0.4, 0.65)  # exponents of brightness of test tiles, which keep black and white
CONTRAST, CAST = (0.7, 1.2), (0.5, 1.0)  # factors of contrast, and of each color channel

MATERIALS = ("brick", "grass", "gravel", "immunohistochemistry", "hubble", "chelsea")
TRAIN_SCENES, TEST_SCENES = 120, 80
MOST_MATERIALS = 4  # in one image; at least 2
BLOB_PIXELS = 14.0  # standard deviation of the Gaussian that smooths the noise of blobs
MATERIAL_LIGHT = (0.75, 1.25)  # factors of brightness of one material in one image

# Calibration of the image, from the docstring of skimage.data.stereo_motorcycle.
FOCAL_PIXELS, BASELINE_METERS, OFFSET_PIXELS = 994.978, 0.193001, 31.086
DEPTH_RANGE = (1.0, 6.0)  # meters; the region's depth is 2.1 to 4.2
DEPTH_TILE, DEPTH_STRIDE = 64, (12, 16)  # pixels in the photograph: side; steps to the right and down

SCENE_SIDE, SCENES = 56, 2  # pixels in the photograph; scenes of each photograph
EASY, HARD, JUNK = 2, 3, 2  # images of each scene
EASY_SHIFT, JUNK_SHIFT = 0.12, 0.6  # of the side: they leave 63 % or more, and 25 % of the union in common
ZOOMS = (0.55, 1.45)  # sides of hard images, in sides of the query


def build_sample_sets(folder: Path, seed: int = 0) -> None:
    """Write one folder for each set, named after its task, atomically.

    Args:
        folder: replaced if it exists.
        seed: equal seeds give equal bytes.
    """
    photographs = {name: photo.convert("RGB") for name, photo in load_photographs().items() if name not in POOL_ONLY}
    builders = (_classification, _segmentation, _depth, _retrieval)
    with atomic_dir(folder) as staging:
        for number, build in enumerate(builders):
            build(staging / build.__name__.lstrip("_"), photographs, np.random.default_rng([seed, number]))


def _classification(folder: Path, photographs: dict[str, Image.Image], generator: np.random.Generator) -> None:
    """Write tiles of each photograph, its class; those of test lie apart from train, and are under other light."""
    lights = []
    for name in CLASSES:
        photo = photographs[name]
        for split, count in (("train", TRAIN_TILES), ("test", TEST_TILES)):
            for number, box in enumerate(_tiles(photo, _part(name, photo, split), count, generator)):
                tile = photo.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                light = "natural" if split == "train" else ("dark", "bright")[number % 2]
                if split == "test":
                    tile = _relight(tile, DARK if light == "dark" else BRIGHT, generator)
                path = f"{split}/{name}/{number:02d}.jpg"
                lights.append((path, light))
                _save_jpeg(folder / "images" / path, tile)
    _write_config(folder, EvalsetConfig(task="classification", license=SAMPLE_LICENSE, groups=("light",)))
    _write_csv(folder / "groups.csv", ("image", "light"), lights)


def _part(name: str, photo: Image.Image, split: str) -> Box:
    """Return the upper part of a photograph's evaluation region for train, the lower one for test."""
    high = round(photo.height * SPLIT_SHARE)
    top = 0 if split == "train" else photo.height - high
    return pool_width(name, photo), top, photo.width, top + high


def _tiles(photo: Image.Image, region: Box, count: int, generator: np.random.Generator) -> list[Box]:
    """Draw textured tiles of a region."""
    left, top, right, bottom = region
    boxes = [
        (x, y, x + side, y + side)
        for side in TILE_SIDES
        for y in range(top, bottom - side + 1, round(side * TILE_STRIDE))
        for x in range(left, right - side + 1, round(side * TILE_STRIDE))
    ]
    drawn = (boxes[index] for index in generator.permutation(len(boxes)))
    return sorted(islice((box for box in drawn if textured(photo, box)), count))


def _relight(image: Image.Image, exponents: tuple[float, float], generator: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and the color of the light."""
    pixels = np.asarray(ImageEnhance.Contrast(image).enhance(generator.uniform(*CONTRAST))) / 255
    gains = generator.uniform(*CAST, 3)
    lit = pixels ** generator.uniform(*exponents) * (gains / gains.max())
    return Image.fromarray(np.round(lit * 255).astype(np.uint8))


def _segmentation(folder: Path, photographs: dict[str, Image.Image], generator: np.random.Generator) -> None:
    """Write compositions of textures in blobs and polygons, with the material of each pixel as mask."""
    for split, count in (("train", TRAIN_SCENES), ("test", TEST_SCENES)):
        textures = [np.asarray(photographs[name].crop(_part(name, photographs[name], split))) for name in MATERIALS]
        for number in range(count):
            shapes: Callable[[int, np.random.Generator], NDArray[np.int64]] = (_blobs, _polygons)[number % 2]
            chosen = generator.permutation(len(MATERIALS))[: generator.integers(2, MOST_MATERIALS + 1)]
            mask = chosen[shapes(len(chosen), generator)]  # [H, W]
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            for material in chosen:
                patch = _patch(textures[material], generator)
                pixels = np.where((mask == material)[..., None], patch, pixels)
            path = f"{split}/{number:03d}"
            _save_jpeg(folder / "images" / f"{path}.jpg", Image.fromarray(pixels))
            _save_png(folder / "targets" / f"{path}.png", mask.astype(np.uint8))
    classes: dict[int, str] = dict(enumerate(MATERIALS))
    _write_config(folder, EvalsetConfig(task="segmentation", license=SAMPLE_LICENSE, classes=classes))


def _patch(texture: Pixels, generator: np.random.Generator) -> Pixels:
    """Cut a square of a texture at random, mirrored or not, a little brighter or darker."""
    y, x = (int(generator.integers(0, size - SIDE + 1)) for size in texture.shape[:2])
    patch = texture[y : y + SIDE, x : x + SIDE, :][:, :: int(generator.choice((1, -1)))]
    return np.clip(patch * generator.uniform(*MATERIAL_LIGHT), 0, 255).astype(np.uint8)


def _blobs(count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Divide a square into smooth regions: of smoothed noises, the highest at each pixel; [H, W] indices."""
    noise = generator.standard_normal((count, SIDE, SIDE))
    smooth: NDArray[np.float64] = np.asarray(gaussian_filter(noise, (0, BLOB_PIXELS, BLOB_PIXELS), mode="reflect"))
    return smooth.argmax(axis=0)


def _polygons(count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Divide a square into the cells of two random points for each region; [H, W] indices."""
    points = generator.uniform(0, SIDE, (2 * count, 2))
    grid = np.moveaxis(np.indices((SIDE, SIDE)), 0, -1)  # [H, W, 2]
    return ((grid[:, :, None, :] - points) ** 2).sum(axis=-1).argmin(axis=-1) % count


def _depth(folder: Path, photographs: dict[str, Image.Image], generator: np.random.Generator) -> None:
    """Write tiles of the stereo photograph with their depth in meters: train on the left of the region, test right."""
    photo, meters = photographs["motorcycle"], motorcycle_depth()
    left, width = pool_width("motorcycle", photo), photo.width - pool_width("motorcycle", photo)
    part = round(width * SPLIT_SHARE)
    for split, start in (("train", left), ("test", photo.width - part)):
        across = range(start, start + part - DEPTH_TILE + 1, DEPTH_STRIDE[0])
        boxes = [(x, y) for y in range(0, photo.height - DEPTH_TILE + 1, DEPTH_STRIDE[1]) for x in across]
        for number, (x, y) in enumerate(boxes):
            depth = Image.fromarray(meters[y : y + DEPTH_TILE, x : x + DEPTH_TILE])
            tile = photo.crop((x, y, x + DEPTH_TILE, y + DEPTH_TILE)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            # Nearest: between two surfaces there is no depth in the middle.
            millimeters = np.asarray(depth.resize((SIDE, SIDE), Image.Resampling.NEAREST)) * 1000
            _save_jpeg(folder / "images" / split / f"{number:03d}.jpg", tile)
            _save_png(folder / "targets" / split / f"{number:03d}.png", np.round(millimeters).astype(np.uint16))
    _write_config(folder, EvalsetConfig(task="depth", license=SAMPLE_LICENSE, depth_range=DEPTH_RANGE))


def motorcycle_depth() -> NDArray[np.float32]:
    """Depth of scikit-image's stereo photograph, [H, W] meters, 0 where its disparity is unknown.

    depth = focal length * baseline / (disparity + offset of the principal points), as Middlebury's datasets define it
    (Scharstein et al. 2014).
    """
    from skimage import data

    disparity = np.asarray(data.stereo_motorcycle()[2], dtype=np.float32)
    meters = FOCAL_PIXELS * BASELINE_METERS / (disparity + OFFSET_PIXELS)
    return np.where(np.isfinite(disparity), meters, 0).astype(np.float32)


def _retrieval(folder: Path, photographs: dict[str, Image.Image], generator: np.random.Generator) -> None:
    """Write scenes: a query; easy images a little beside it, hard ones of other scale and light, junk far beside it."""
    pairs, groups = [], []
    for name, photo in photographs.items():
        for number, center in enumerate(_centers(name, photo)):
            scene = f"{name}-{number}"
            query = f"queries/{scene}.jpg"
            shown = {query: photo.crop(_square(center, SCENE_SIDE))}
            for relation, image in _related(photo, center, generator):
                path = f"gallery/{scene}-{relation}-{len(shown)}.jpg"
                shown[path] = image
                pairs.append((query, path, relation))
            for path, image in shown.items():
                groups.append((path, name))
                _save_jpeg(folder / "images" / path, image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    _write_config(folder, EvalsetConfig(task="retrieval", license=SAMPLE_LICENSE, groups=("photograph",)))
    _write_csv(folder / "queries.csv", ("query", "image", "relation"), pairs)
    _write_csv(folder / "groups.csv", ("image", "photograph"), groups)


def _centers(name: str, photo: Image.Image) -> Iterator[tuple[int, int]]:
    """Yield the centers of the scenes, (x, y): in each part of the height, the place of most contrast, unless flat.

    No image of a scene leaves its part, so that two scenes share nothing.
    """
    x, part = (pool_width(name, photo) + photo.width) // 2, photo.height // SCENES
    margin = round(SCENE_SIDE * max(ZOOMS) / 2) + 1
    gray = np.asarray(photo.convert("L"), dtype=np.float32)
    for number in range(SCENES):
        centers = [(x, y) for y in range(number * part + margin, (number + 1) * part - margin + 1, 4)]
        boxes = [_square(center, SCENE_SIDE) for center in centers]
        best = int(np.argmax([gray[top:bottom, left:right].std() for left, top, right, bottom in boxes]))
        if textured(photo, boxes[best]):
            yield centers[best]


def _square(center: tuple[float, float], side: float) -> Box:
    left, top = (round(value - side / 2) for value in center)
    return left, top, left + round(side), top + round(side)


def _related(
    photo: Image.Image, center: tuple[int, int], generator: np.random.Generator
) -> Iterator[tuple[str, Image.Image]]:
    """Yield the images of a scene beside its query, with their relation to it."""

    def beside(shift: Iterable[float]) -> Image.Image:
        moved = tuple(value + SCENE_SIDE * share for value, share in zip(center, shift, strict=True))
        return photo.crop(_square((moved[0], moved[1]), SCENE_SIDE))

    for _ in range(EASY):
        yield "easy", beside(generator.uniform(-EASY_SHIFT, EASY_SHIFT, 2))
    for number in range(HARD):
        zoomed = photo.crop(_square(center, SCENE_SIDE * ZOOMS[number % 2]))
        yield "hard", _relight(zoomed, (DARK, BRIGHT)[number // 2], generator)
    for sign in (-1, 1)[:JUNK]:
        yield "junk", beside((sign * JUNK_SHIFT, 0.0))


def _save_jpeg(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=92)


def _save_png(path: Path, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _write_config(folder: Path, config: EvalsetConfig) -> None:
    values = config.model_dump(mode="json", exclude_defaults=True)
    (folder / "evalset.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    path.write_text("".join(",".join(row) + "\n" for row in (header, *rows)))
