"""`python -m tests.benchmarks.openclipart FOLDER MODEL [MODEL ...] [--most N]`: models on Debian's openclipart-png.

FOLDER holds one folder of pictures for each class; the package has them in /usr/share/openclipart/png. Classes of 30
pictures or more but `unsorted` are kept, at most N pictures of each, and each fifth is a test image. A picture that is
in several folders stays in the first, and those above the limit of pixels are left out; both are counted. A MODEL is a
weights folder of Pedigree, or a file or folder that `pedigree evaluate` takes. Prints a table of kNN (with 1 and 5
pictures of each class too), logistic regression and linear probe, beside random weights of the first model and the
descriptor.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import typer
import yaml
from PIL import Image

from components.data.evalset import Evalset, read_evalset
from components.data.evalset_add import add_evalset
from components.data.evalset_config import EvalsetRequest
from components.data.shards import MAX_PIXELS
from components.evaluation.compare import ComparedModel, baselines, compare, load_model
from components.evaluation.config import EvaluateConfig, KnnConfig
from components.evaluation.external import external_kind, load_external
from components.evaluation.settings import scaled, settings_for
from components.model.config import Preprocessing
from components.recipe import load_recipe

LEAST, FIFTH = 30, 5
SHOTS = (1, 5)
METRICS = ("knn_top1", "linear_top1", "probe_top1")


def usable(pictures: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class, each picture once; tell what is left out."""
    seen: set[str] = set()
    classes: dict[str, list[Path]] = {}
    counts = {"copies": 0, "too large": 0}
    for path in sorted(pictures.rglob("*.png")):
        name, digest = path.relative_to(pictures).parts[0], hashlib.sha256(path.read_bytes()).hexdigest()
        with Image.open(path) as image:
            large = image.width * image.height > MAX_PIXELS
        if digest in seen or large:
            counts["too large" if large else "copies"] += 1
            continue
        seen.add(digest)
        classes.setdefault(name, []).append(path)
    sys.stdout.write(f"left out: {counts}\n")
    return {name: found for name, found in classes.items() if name != "unsorted" and len(found) >= LEAST}


def write_set(pictures: Path, folder: Path, most: int | None) -> int:
    """Write the folder of an evaluation set; return the number of classes."""
    classes = {name: found[:most] for name, found in usable(pictures).items()}
    for name, found in classes.items():
        for number, picture in enumerate(found):
            split = "test" if number % FIFTH == 0 else "train"
            place = folder / "images" / split / name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, place / f"{number:05d}.png")
    config = {"task": "classification", "license": "CC0-1.0"}
    (folder / "evalset.yaml").write_text(yaml.safe_dump(config))
    return len(classes)


def load(given: str, evalset: Evalset, preprocessing: Preprocessing) -> ComparedModel:
    """Load a model of any kind."""
    kind = external_kind(given)
    if kind is not None:
        return load_external(given, kind, evalset).model
    return load_model(given, Path(given), lambda shape: scaled(preprocessing, evalset, shape.patch_size))


def table(evalset: Evalset, models: list[str], config: EvaluateConfig, cache: Path) -> str:
    """Measure the models; a row of Markdown for each, with 95 % intervals."""
    few = config.model_copy(update={"knn": KnnConfig(few_shot=SHOTS)})
    loaded = [load(given, evalset, config.preprocessing) for given in models]
    loaded += baselines(loaded[0], 0)
    found = compare(evalset, loaded, ("knn", "linear", "probe"), settings_for(evalset, few), cache, 0)
    shots = [metric for metric in next(iter(found.scores.values())).metrics if "shot" in metric]
    lines = [f"| model | {' | '.join((*METRICS, *shots))} |", "|---" * (1 + len(METRICS) + len(shots)) + "|"]
    for name, scores in found.scores.items():
        certain = scores.intervals()
        cells = [f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f})" for one in (certain[metric] for metric in METRICS)]
        cells += [f"{scores.metrics[metric]:.3f}" for metric in shots]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(pictures: Path, models: list[str], most: int | None = None) -> None:
    """Make the set in a temporary folder, measure, print."""
    Image.MAX_IMAGE_PIXELS = None  # only sizes are read here
    config = load_recipe(Path(), "tiny-cpu").evaluate
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = write_set(pictures, folder / "set", most)
        request = {"source": folder / "set", "name": "openclipart", "evaluation": folder / "evaluation"}
        made = add_evalset(EvalsetRequest.parse(**request, docs_folder=folder / "docs"))
        evalset = read_evalset(made.snapshot)
        sys.stdout.write(f"{classes} classes; {made}\n{table(evalset, models, config, folder / 'tokens')}\n")


if __name__ == "__main__":
    typer.run(main)
