"""`python -m tests.benchmarks.copies [--weights FOLDER]`: which copies curation finds, and what it takes for one.

Tiles of real photographs (`components/data/sample_pool.py`); tiles of one photograph share 30 % of their area at most
and are no copies. For each kind of copy the pool is the originals and one copy of every second of them; precision and
recall are over the pairs above the threshold. Leaks are the same copies of evaluation images among the originals; there
they are over the images of the pool that are above the threshold to any evaluation image.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from components.curation.config import DescriptorConfig, EmbedderConfig, ModelConfig
from components.curation.embedders import Embed, load, resolve
from components.data.sample_pool import build_sample_pool
from components.model.config import Preprocessing

DEDUPLICATE, DECONTAMINATE = 0.6, 0.45
MIN_SIDE = 80  # pixels of an original
EVERY = 2  # originals to a copy
PRECISION = 0.99  # for the last column

Vectors = NDArray[np.float32]  # [N, D]
Copy = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Found:
    """How well one kind of copy is told from other images."""

    kind: str
    against: str
    threshold: float
    copies: int
    recall: float
    precision: float  # NaN where nothing is above the threshold
    best_recall: float  # at the lowest threshold of which the precision is 0.99


def measure(sample: Path, embed: Embed, originals: int, seed: int = 0) -> list[Found]:
    """Precision and recall of each kind of copy, in the pool and against the evaluation set.

    Args:
        sample: what `build_sample_pool` wrote.
        embed: maps images to [B, D].
        originals: images of the pool, and of the evaluation set.
        seed: of the choice of tiles and of the copies.
    """
    generator = np.random.default_rng(seed)
    pool = _tiles(sample, "pool/", originals, generator)
    evaluation = _tiles(sample, "evaluation/", originals, generator)
    pool_vectors, evaluation_vectors = _vectors(embed, pool), _vectors(embed, evaluation)
    found = []
    for against, images, vectors, threshold in (
        ("pool", pool, pool_vectors, DEDUPLICATE),
        ("evaluation", evaluation, evaluation_vectors, DECONTAMINATE),
    ):
        own = np.arange(0, len(images), EVERY)
        for kind, copy in KINDS.items():
            copies = _vectors(embed, [copy(images[i], generator) for i in own])
            compare = _pairs if against == "pool" else _leaks
            similarity, right = compare(vectors, pool_vectors, copies, own)
            found.append(Found(kind, against, threshold, len(own), *_scores(similarity, right, len(own), threshold)))
    return found


def same(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """The same pixels, from another file."""
    return image.copy()


def re_encoded(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """JPEG of quality 55."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=55)
    return Image.open(buffer).convert("RGB")


def rescaled(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Half to one and a half times the size."""
    factor = float(generator.choice([0.5, 0.7, 1.5]))
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random rectangle of 70 % of the area."""
    width, height = round(image.width * 0.7**0.5), round(image.height * 0.7**0.5)
    left, top = (int(generator.integers(0, room + 1)) for room in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def flipped(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def watermarked(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """Half-transparent white text across the whole width."""
    layer = Image.new("RGBA", image.size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(layer)
    font = ImageFont.load_default(image.width / 5)
    draw.text((image.width / 2, image.height / 2), "© SAMPLE", (255, 255, 255, 128), font, anchor="mm")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


KINDS: dict[str, Copy] = {
    "exact": same,
    "re-encoded": re_encoded,
    "rescaled": rescaled,
    "cropped to 70 %": cropped,
    "flipped": flipped,
    "watermarked": watermarked,
}


def _tiles(sample: Path, prefix: str, count: int, generator: np.random.Generator) -> list[Image.Image]:
    boxes = json.loads((sample / "ground_truth.json").read_text())["boxes"]
    paths = [sample / name for name in boxes if name.startswith(prefix) and (sample / name).is_file()]
    images = (Image.open(paths[i]) for i in generator.permutation(len(paths)))
    large = (image.convert("RGB") for image in images if min(image.size) >= MIN_SIDE)
    return [image for image, _ in zip(large, range(count), strict=False)]


def _vectors(embed: Embed, images: list[Image.Image]) -> Vectors:
    """[N, D] of unit norm."""
    vectors = np.concatenate([embed(images[i : i + 32]) for i in range(0, len(images), 32)])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _pairs(_: Vectors, pool: Vectors, copies: Vectors, own: NDArray[np.int64]) -> tuple[Vectors, NDArray[np.bool_]]:
    """Cosine of every pair among originals and copies, and whether it is a copy with its original."""
    whole = np.concatenate([pool, copies])
    right = np.zeros((len(whole), len(whole)), bool)
    right[len(pool) + np.arange(len(own)), own] = True
    below = np.tril_indices(len(whole), -1)
    return (whole @ whole.T)[below], right[below]


def _leaks(
    evaluation: Vectors, pool: Vectors, copies: Vectors, _: NDArray[np.int64]
) -> tuple[Vectors, NDArray[np.bool_]]:
    """Cosine of every image of the pool to the nearest evaluation image, and whether it is a leak."""
    whole = np.concatenate([pool, copies])
    return (whole @ evaluation.T).max(axis=1), np.arange(len(whole)) >= len(pool)


def _scores(similarity: Vectors, right: NDArray[np.bool_], copies: int, threshold: float) -> tuple[float, float, float]:
    above = similarity > threshold
    order = np.argsort(-similarity, kind="stable")
    hits = np.cumsum(right[order])
    precise = np.flatnonzero(hits / np.arange(1, len(hits) + 1) >= PRECISION)
    best = float(hits[precise[-1]]) if len(precise) else 0.0
    found = int((right & above).sum())
    return found / copies, found / int(above.sum()) if above.any() else math.nan, best / copies


def main(
    weights: Annotated[Path | None, typer.Option(help="A weights folder, beside the descriptor.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels, for those weights.")] = 64,
    originals: Annotated[int, typer.Option(help="Of the pool, and of the evaluation set.")] = 400,
) -> None:
    """Print the table of components/curation/README.md."""
    embedders: dict[str, EmbedderConfig] = {"descriptor": DescriptorConfig()}
    if weights is not None:
        embedders["model"] = ModelConfig(weights=str(weights), preprocessing=Preprocessing().at(image_size))
    console = Console(width=200)
    console.print("| embedder | kind | among | above | copies | recall | precision | recall at precision 0.99 |")
    console.print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        build_sample_pool(Path(folder) / "sample")
        for name, config in embedders.items():
            for row in measure(Path(folder) / "sample", load(resolve(config, Path())), originals):
                figures = f"{row.copies} | {row.recall:.3f} | {row.precision:.3f} | {row.best_recall:.3f}"
                console.print(f"| {name} | {row.kind} | {row.against} | {row.threshold} | {figures} |")


if __name__ == "__main__":
    typer.run(main)
