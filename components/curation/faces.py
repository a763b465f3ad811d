"""Detect and blur faces.

Default detector: the frontal-face LBP cascade of scikit-image (from OpenCV). It misses faces in profile, rotated by
more than a few degrees, or smaller than 24 pixels at the working size; README.md has its recall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.curation.config import CascadeConfig, CurationError, FaceOnnxConfig, FacesConfig
from components.curation.score_models import find_file, open_onnx, run_onnx

CASCADE_WINDOW = 24  # pixels, the cascade's smallest face
SCALE_FACTOR = 1.1  # from one size of window to the next
MARGIN = 0.3  # of a box's side, on each side, for hair, chin and tight boxes
CELLS = 4  # a blurred face retains 4 x 4 color averages

Box = dict[str, int]  # x, y, w, h in pixels of the image
FindFaces = Callable[[Image.Image], list[Box]]


def locate(config: FacesConfig, root: Path) -> Path:
    """Return the detector's file.

    Raises:
        CurationError: the file does not exist.
    """
    if isinstance(config, FaceOnnxConfig):
        return find_file(config.path, root, "embed.scores.faces.path")
    from skimage.data import lbp_frontal_face_cascade_filename

    return Path(lbp_frontal_face_cascade_filename())


def load(config: FacesConfig, path: Path) -> FindFaces:
    """Load a detector, which maps an RGB image to boxes sorted from the top."""
    if isinstance(config, FaceOnnxConfig):
        return _load_onnx(config, path)
    return _load_cascade(config, path)


def blur(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return a copy of an RGB image without metadata, with each box and a margin reduced to 4 x 4 color averages.

    The averages are upsampled smoothly, without cell edges. All other detail is removed from the pixels, so that it
    cannot be recovered; metadata is dropped because it may contain a thumbnail of the face.

    Args:
        image: RGB.
        boxes: from the detector; parts outside of the image are ignored.
    """
    blurred = Image.fromarray(np.array(image))  # pixels only
    for box in boxes:
        left, top, right, bottom = _with_margin(box, image.size)
        if left < right and top < bottom:
            averages = Image.fromarray(_averages(np.asarray(blurred)[top:bottom, left:right]))
            blurred.paste(averages.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return blurred


def _averages(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [4, 4, 3] rounded cell means of [H, W, 3]; fewer cells if there are fewer pixels.

    Sums are exact: rounding in Pillow's resize would leak traces of the pixel order within a cell.
    """
    sums, counts = pixels.astype(np.int64), np.ones((1, 1, 1), np.int64)
    for axis in (0, 1):
        side = pixels.shape[axis]
        starts = np.arange(min(CELLS, side)) * side // min(CELLS, side)
        sums = np.add.reduceat(sums, starts, axis)
        counts = counts * np.expand_dims(np.diff(starts, append=side), (1 - axis, 2))
    return np.rint(sums / counts).astype(np.uint8)


def _with_margin(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    across, down = round(MARGIN * box["w"]), round(MARGIN * box["h"])
    left, top = max(box["x"] - across, 0), max(box["y"] - down, 0)
    return left, top, min(box["x"] + box["w"] + across, size[0]), min(box["y"] + box["h"] + down, size[1])


def _load_cascade(config: CascadeConfig, path: Path) -> FindFaces:
    from skimage.feature import Cascade

    cascade = Cascade(str(path))

    def find(image: Image.Image) -> list[Box]:
        small, scale = _fit(image, config.working_side)
        if min(small.size) < CASCADE_WINDOW:
            return []
        side = min(small.size)
        found = cascade.detect_multi_scale(
            np.asarray(small),
            scale_factor=SCALE_FACTOR,
            step_ratio=1,
            min_size=(CASCADE_WINDOW, CASCADE_WINDOW),
            max_size=(side, side),
            min_neighbor_number=config.min_neighbors,
        )
        corners = [(one["c"], one["r"], one["c"] + one["width"], one["r"] + one["height"]) for one in found]
        return _boxes(np.array(corners, np.float64).reshape(-1, 4) / scale, image.size)

    return find


def _load_onnx(config: FaceOnnxConfig, path: Path) -> FindFaces:
    session = open_onnx(path)

    def find(image: Image.Image) -> list[Box]:
        small, scale = _fit(image, config.size, enlarge=True)
        canvas = Image.new("RGB", (config.size, config.size))
        canvas.paste(small)
        pixels = np.asarray(canvas, np.float32).transpose(2, 0, 1)[None] / 255  # [1, 3, S, S]
        found = run_onnx(session, path, np.ascontiguousarray(pixels))
        if found.ndim != 2 or found.shape[1] != 5:
            raise CurationError(f"{path}: gave shape {list(found.shape)}; expected [M, 5]: x1, y1, x2, y2, score")
        return _boxes(found[found[:, 4] >= config.min_score, :4].astype(np.float64) / scale, image.size)

    return find


def _fit(image: Image.Image, side: int, enlarge: bool = False) -> tuple[Image.Image, float]:
    """Return the image with its longer side resized to `side` (smaller images only if `enlarge`), and the factor."""
    scale = side / max(image.size)
    if scale >= 1 and not enlarge:
        return image, 1.0
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR), scale


def _boxes(corners: NDArray[np.float64], size: tuple[int, int]) -> list[Box]:
    """Convert [M, 4] corners x1, y1, x2, y2 to boxes clipped to the image; drop empty ones."""
    limits = np.array([*size, *size])
    inside = np.unique(np.clip(np.rint(corners), 0, limits).astype(int), axis=0)
    ordered = sorted(inside.tolist(), key=lambda corner: (corner[1], corner[0]))
    return [{"x": x, "y": y, "w": x2 - x, "h": y2 - y} for x, y, x2, y2 in ordered if x2 > x and y2 > y]
