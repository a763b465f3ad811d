"""Where faces are in an image, and how they are made unrecognizable.

Default detector: the frontal-face LBP cascade that scikit-image carries (OpenCV's). It does not see faces in profile,
turned by more than a few degrees, or smaller than 24 pixels at the working size; README.md has its recall.
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
MARGIN = 0.3  # of a box's side, on each of its sides: hair, chin and what the detector cut off
CELLS = 4  # a blurred face is what 4 x 4 averages of color can say

Box = dict[str, int]  # x, y, w, h in pixels of the image
FindFaces = Callable[[Image.Image], list[Box]]


def locate(config: FacesConfig, root: Path) -> Path:
    """The detector's file.

    Raises:
        CurationError: there is no file at the path.
    """
    if isinstance(config, FaceOnnxConfig):
        return find_file(config.path, root, "embed.scores.faces.path")
    from skimage.data import lbp_frontal_face_cascade_filename

    return Path(lbp_frontal_face_cascade_filename())


def load(config: FacesConfig, path: Path) -> FindFaces:
    """Load a detector, which maps an RGB image to boxes, ordered from the top."""
    if isinstance(config, FaceOnnxConfig):
        return _load_onnx(config, path)
    return _load_cascade(config, path)


def blur(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB image without metadata, in which nothing of the boxes and a margin is left but 4 x 4 averages.

    The averages are smoothed back to full size, so no edge of a cell is left either. What they do not hold is gone
    from the pixels, so that no method can bring it back; metadata goes because it may hold a preview of the face.

    Args:
        image: RGB.
        boxes: as the detector found them; parts beyond the image are ignored.
    """
    blurred = Image.fromarray(np.array(image))  # pixels only
    for box in boxes:
        left, top, right, bottom = _with_margin(box, image.size)
        if left < right and top < bottom:
            averages = Image.fromarray(_averages(np.asarray(blurred)[top:bottom, left:right]))
            blurred.paste(averages.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return blurred


def _averages(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[4, 4, 3] rounded means of the cells of [H, W, 3]; fewer cells where there are fewer pixels.

    Exact sums: Pillow's resize would let a trace of the order inside a cell through its rounding.
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
    """The image with its longer side brought to `side` (or left as it is, where shorter), and by what factor."""
    scale = side / max(image.size)
    if scale >= 1 and not enlarge:
        return image, 1.0
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR), scale


def _boxes(corners: NDArray[np.float64], size: tuple[int, int]) -> list[Box]:
    """Boxes inside the image from [M, 4] corners x1, y1, x2, y2 in its pixels; empty ones are dropped."""
    limits = np.array([*size, *size])
    inside = np.unique(np.clip(np.rint(corners), 0, limits).astype(int), axis=0)
    ordered = sorted(inside.tolist(), key=lambda corner: (corner[1], corner[0]))
    return [{"x": x, "y": y, "w": x2 - x, "h": y2 - y} for x, y, x2, y2 in ordered if x2 > x and y2 > y]
