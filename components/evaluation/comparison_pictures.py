"""Pictures of a comparison: patch features, neighbors, predictions, failures, matching patches, corruption curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from components.core.charts import new_figure, png
from components.core.metric_names import lower_is_better
from components.core.page import Picture
from components.core.pictures import draw_pca, jpeg, pca_colors
from components.data.evalset import Evalset
from components.evaluation.compare import ComparedModel, Comparison
from components.evaluation.dense_pictures import (
    Predicted,
    Shown,
    draw_depth,
    draw_matches,
    draw_segmentation,
    patch_matches,
)
from components.evaluation.features import EvaluationImages
from components.evaluation.pictures import choose_queries, draw_neighbors, neighbor_rows, retrieved_rows
from components.evaluation.protocol_input import crop_target
from components.model.config import Preprocessing

SHOWN = 8  # images in each picture
DENSE_SHOWN = 5  # images in a picture of maps, a row each
# What decides which predicted map is the worst, after the prefix of the protocol's metrics.
BY_IMAGE = {"segmentation": "image_miou", "depth": "rmse"}
COLUMNS = 4  # of charts side by side
LINES = ("-", "--", "-.", ":")  # told apart without color too

Figure = tuple[str, Picture, str]  # title, picture, caption


def figures(found: Comparison, models: Sequence[ComparedModel], seed: int) -> list[Figure]:
    """Return the pictures of a comparison.

    Args:
        found: scores and tokens.
        models: in the order of the comparison.
        seed: of the choice of images.
    """
    first, images = models[0], found.evalset.images
    pixels = EvaluationImages(images, first.preprocessing)
    queries = choose_queries(images, SHOWN, seed)
    shown = torch.stack([pixels[index] for index in queries])
    made = _curves(found) + _predictions(found, models, pixels, seed)
    alike = [one for one in models if one.preprocessing.sizes == first.preprocessing.sizes]
    patches = {one.name: one.encoder.last_patches(shown) for one in alike}
    made += _patch_colors(patches, shown)
    made += _retrieved(found, pixels, seed) if found.evalset.config.task == "retrieval" else []
    made += _neighbors(found, pixels, queries, seed) if found.evalset.config.task != "retrieval" else []
    if (tokens := patches[first.name]) is not None and len(queries) > 1:
        made.append(_matches(tokens[:2], shown[:2]))
    return made


def _patch_colors(patches: Mapping[str, NDArray[np.float32] | None], shown: torch.Tensor) -> list[Figure]:
    colors = {name: pca_colors(tokens) for name, tokens in patches.items() if tokens is not None}
    if not colors:
        return []
    picture = _picture(draw_pca(shown.numpy(), colors), "Images, and the patch features of each model as colors")
    caption = "First three principal components of the patch tokens, as colors, in each row."
    return [("Patch features", picture, caption)]


def _neighbors(found: Comparison, pixels: EvaluationImages, queries: Sequence[int], seed: int) -> list[Figure]:
    images, features = found.evalset.images, next(iter(found.tokens.values())).features
    rows = neighbor_rows(images, pixels, features, queries)
    caption = "By cosine of the features. Frame: green same class, red other, gray no class."
    made = [("Nearest neighbors", _picture(draw_neighbors(rows), "Images and their nearest neighbors"), caption)]
    if failures := _failures(found, seed):
        sheet = draw_neighbors(neighbor_rows(images, pixels, features, failures))
        picture = _picture(sheet, "Images of a wrong class and their nearest neighbors")
        made.append(("Failures", picture, "Test images of a wrong class, with their neighbors."))
    return made


def _retrieved(found: Comparison, pixels: EvaluationImages, seed: int) -> list[Figure]:
    """Return what some queries find, and those that find their positives worst."""
    evalset, features = found.evalset, next(iter(found.tokens.values())).features
    by_image = next(iter(found.scores.values())).by_image
    metric, values = next(one for one in by_image.items() if one[0].endswith("_map_medium"))  # all queries have it
    asked = evalset.queries
    worst = np.argsort(values, kind="stable")[:SHOWN]
    drawn = np.random.default_rng(seed).permutation(len(asked))[:SHOWN]
    frames = "Frame: green to be found, red not, gray junk."
    made = []
    for title, rows, caption in (
        ("Retrieved images", drawn, f"Queries at random, by cosine of the features. {frames}"),
        ("Worst queries", worst, f"Lowest {metric} first, of {len(asked):,} queries. {frames}"),
    ):
        sheet = draw_neighbors(retrieved_rows(evalset, pixels, features, [asked[row] for row in rows]))
        made.append((title, _picture(sheet, "Queries and the images nearest to them"), caption))
    return made


def _failures(found: Comparison, seed: int) -> list[int]:
    """Return some test images that the first model's nearest neighbors take for another class."""
    labels, scores = found.evalset.images.labels, next(iter(found.scores.values()))
    if labels is None or "knn_top1" not in scores.by_image:
        return []
    wrong: NDArray[np.int64] = labels.test[scores.by_image["knn_top1"] == 0]
    return [int(row) for row in np.random.default_rng(seed).permutation(wrong)[:SHOWN]]


def _matches(tokens: NDArray[np.float32], pair: torch.Tensor) -> Figure:
    side = isqrt(tokens.shape[1])
    a, b = tokens.reshape(2, side, side, -1)
    first, second = (Image.fromarray(one.numpy()) for one in pair)
    picture = _picture(draw_matches(first, second, patch_matches(a, b)), "Lines between matching patches of two images")
    return ("Matching patches", picture, "Patches that are each other's nearest neighbor.")


def _predictions(
    found: Comparison, models: Sequence[ComparedModel], pixels: EvaluationImages, seed: int
) -> list[Figure]:
    """Return the maps that the models predict of some test images, and of those that the first model does worst."""
    scores = next(iter(found.scores.values()))
    if not scores.predict:
        return []
    prefix = found.evalset.config.metric.rpartition("_")[0]
    prefix = prefix if prefix in scores.predict else next(iter(scores.predict))
    metric = f"{prefix}_{BY_IMAGE[found.evalset.config.task]}"
    values, test = scores.by_image[metric], found.evalset.test
    worst = np.argsort(-values if lower_is_better(metric) else values, kind="stable")[:DENSE_SHOWN]
    drawn = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(test)), worst))[:DENSE_SHOWN]
    chosen = [
        (f"Predictions of {prefix}", drawn, f"Test images at random. Below a prediction: its {metric}."),
        (
            f"Worst predictions of {models[0].name}",
            worst,
            f"By {metric}, of {len(test):,} test images, the worst first.",
        ),
    ]
    scaling = {model.name: model.preprocessing for model in models}
    return [
        (name, _picture(_draw_maps(found, scaling, pixels, (prefix, metric), rows), name), caption)
        for name, rows, caption in chosen
        if len(rows)
    ]


def _draw_maps(
    found: Comparison,
    scaling: Mapping[str, Preprocessing],
    pixels: EvaluationImages,
    measured: tuple[str, str],
    rows: NDArray[np.int64],
) -> Image.Image:
    """Draw some test images with their truth and what each model predicts.

    Args:
        found: scores with `predict`.
        scaling: of each model's images.
        pixels: as the first model is given them.
        measured: prefix of the protocol and the metric below each map.
        rows: numbers of test images.
    """
    (prefix, metric), evalset, images = measured, found.evalset, found.evalset.test[rows]
    names = [evalset.images.images["source_uri"][int(image)].as_py() for image in images]
    first = next(iter(scaling.values()))
    shown = Shown([pixels[int(image)].numpy() for image in images], names, _truth(evalset, images, first))
    predicted = {}
    for name, scores in found.scores.items():
        if prefix in scores.predict:
            maps = list(scores.predict[prefix](images))
            notes = [f"{value:.3f}" for value in scores.by_image[metric][rows]]
            errors: list[NDArray[np.floating]] = []
            if evalset.config.task == "depth":
                errors = [abs(one - two) for one, two in zip(maps, _truth(evalset, images, scaling[name]), strict=True)]
            predicted[name] = Predicted(maps, notes, errors)
    if evalset.config.task == "depth":
        return draw_depth(shown, predicted)
    return draw_segmentation(shown, predicted, evalset.class_names)


def _truth(evalset: Evalset, images: NDArray[np.int64], scaling: Preprocessing) -> list[NDArray[np.uint8 | np.float32]]:
    if evalset.config.task == "depth":
        return [crop_target(evalset.depth(int(image)), scaling) for image in images]
    return [crop_target(evalset.mask(int(image)), scaling) for image in images]


def _curves(found: Comparison) -> list[Figure]:
    """Return the accuracy by severity of each corruption, and of the mean over all of them, in small charts."""
    curves = {name: scores.curves for name, scores in found.scores.items() if scores.curves}
    if not curves:
        return []
    means = {name: {"mean of all": np.mean(list(one.values()), axis=0), **one} for name, one in curves.items()}
    titles = list(next(iter(means.values())))
    rows = -(-len(titles) // COLUMNS)
    figure = new_figure(10, 1.9 * rows + 0.4)
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, title in zip(grid, titles, strict=False):
        for number, (name, one) in enumerate(means.items()):
            style = LINES[number % len(LINES)]
            axes.plot(one[title], style, marker="o", markersize=3, linewidth=1.4, label=name)
        axes.set_title(title.replace("_", " "), loc="left", fontsize=9, weight="bold" if title == titles[0] else None)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    figure.supxlabel("severity, 0 without corruption", fontsize=9)
    figure.supylabel("accuracy of the nearest neighbors", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(means), frameon=False)
    picture = Picture(png(figure), "Accuracy by severity of each corruption, a line for each model")
    return [("Corruptions", picture, "Train images, from which the neighbors are taken, are not corrupted.")]


def _picture(image: Image.Image, alt: str) -> Picture:
    return Picture(jpeg(image), alt, "jpeg")
