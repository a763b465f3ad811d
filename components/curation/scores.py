"""Scores of an image's pixels, computed once at decoding; thresholds may change later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageChops

from components.core.storage import sha256_file
from components.curation import faces, nsfw
from components.curation.config import ScoresConfig

VERSION = 2  # increment if a change here, in nsfw.py or in faces.py changes a score
SAMPLE_SIDE = 256  # pixels: larger images are subsampled to a grid of at most this side
GRAY_TOLERANCE = 8  # of 255: maximum channel difference of a gray pixel, allowing for JPEG

BOX = pa.struct([pa.field(name, pa.int32(), nullable=False) for name in ("x", "y", "w", "h")])
SCORES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("gray_share", pa.float32(), nullable=False),  # of the pixels
        pa.field("entropy", pa.float32(), nullable=False),  # bits, of the luma histogram: 0 is one flat color
        pa.field("nsfw", pa.float32()),  # probability; null where no classifier is configured
        pa.field("faces", pa.list_(BOX)),  # pixels; null where no detector is configured
    ]
)


@dataclass(frozen=True)
class Scorer:
    """Definition of the scores, sufficient to compute them in any worker; models are loaded on first use."""

    config: ScoresConfig
    nsfw_model: Path | None
    faces_model: Path | None
    digest: str  # SHA-256 over the parameters, the models' bytes and the code version

    def score(self, images: list[Image.Image]) -> dict[str, pa.Array]:
        """Return the columns of SCORES_SCHEMA after `image_id`, one value per RGB image, independent of the others."""
        samples = [sample_pixels(image) for image in images]
        classify, find_faces = _models(self)
        columns = {
            "gray_share": [gray_share(sample) for sample in samples],
            "entropy": [entropy(sample) for sample in samples],
            "nsfw": [classify and classify(image) for image in images],
            "faces": [find_faces and find_faces(image) for image in images],
        }
        return {name: pa.array(values, SCORES_SCHEMA.field(name).type) for name, values in columns.items()}


def load_scorer(config: ScoresConfig, root: Path) -> Scorer:
    """Find the models that the scores need and compute their digest.

    Raises:
        CurationError: a model's file or package is missing.
    """
    nsfw_model = None if config.nsfw is None else nsfw.locate(config.nsfw, root)
    faces_model = None if config.faces is None else faces.locate(config.faces, root)
    definition = {
        "version": VERSION,
        "config": config.model_dump(exclude={"nsfw": {"path"}, "faces": {"path"}}),  # the bytes count, not their path
        "models": [path and sha256_file(path) for path in (nsfw_model, faces_model)],
    }
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
    return Scorer(config, nsfw_model, faces_model, digest)


def sample_pixels(image: Image.Image) -> Image.Image:
    """Return the image, subsampled on a regular grid if larger than SAMPLE_SIDE, without mixing colors."""
    scale = SAMPLE_SIDE / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST)


def gray_share(image: Image.Image) -> float:
    """Return the share of pixels whose channels differ by at most GRAY_TOLERANCE."""
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    counts = ImageChops.subtract(highest, lowest).histogram()
    return sum(counts[: GRAY_TOLERANCE + 1]) / sum(counts)


def entropy(image: Image.Image) -> float:
    """Return the Shannon entropy of an RGB image's luma histogram (ITU-R 601), in bits: 0 (one flat color) to 8."""
    return image.convert("L").entropy()


@lru_cache(maxsize=1)
def _models(scorer: Scorer) -> tuple[nsfw.Classify | None, faces.FindFaces | None]:
    """Load the configured models, once per process."""
    nsfw_config, face_config = scorer.config.nsfw, scorer.config.faces
    classify = nsfw.load(nsfw_config, scorer.nsfw_model) if nsfw_config and scorer.nsfw_model else None
    find_faces = faces.load(face_config, scorer.faces_model) if face_config and scorer.faces_model else None
    return classify, find_faces
