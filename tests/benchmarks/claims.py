"""`make claims`, or `python -m tests.benchmarks.claims [FOLDER]`: the claims of the method in miniature.

Trains the recipe tiny-cpu with three seeds on the sample's pool: on the curated images and on the uncurated ones, a
student by distillation and one of its shape from scratch, each pair for equally many steps. Measures them on the
sample's evaluation sets beside random weights and the descriptor, which is pooled as the networks are, and also as it
is. A claim holds where the 95 % interval of the mean difference over seeds, by test images, excludes zero on the right
side, and the difference of each seed is on that side.

FOLDER (default: .pedigree/claims) keeps all weights and scores: a second call does what is missing. After a change of
code, give another one. A seed takes about 25 minutes of one core (LOG.md). Writes claims.json, claims.md and
claims.png there, after each seed those of the seeds so far.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.adaptation import stage as adaptation
from components.core.config import ConfigError
from components.core.intervals import difference_interval
from components.core.layout import Layout
from components.core.metric_names import lower_is_better
from components.core.metrics import Interval
from components.core.storage import atomic_dir, write_bytes
from components.curation import stage as curation
from components.curation.config import CurateConfig
from components.data.evalset_add import add_evalset
from components.data.evalset_config import EvalsetRequest
from components.data.evalsets import read_named_set
from components.data.sample_sets import build_sample_sets
from components.distillation import stage as distillation
from components.evaluation.baselines import DESCRIPTOR, RANDOM
from components.evaluation.compare import ComparedModel, Comparison, baselines, compare, load_model
from components.evaluation.encoders import DescriptorEncoder
from components.evaluation.settings import scaled, settings_for
from components.model.config import Preprocessing, ViTConfig
from components.pretraining import stage as pretraining
from components.pretraining.config import PretrainConfig
from components.recipe import Recipe, load_recipe
from tests.benchmarks.learns import STUDENT, make_collections
from tests.benchmarks.step_side import Side
from tests.benchmarks.step_speed import measure

SEEDS = (0, 1, 2)
CURATED, UNCURATED, STUDENTS, SCRATCH = "curated", "uncurated", "student", "from scratch"
WHOLE = "descriptor of whole images"  # DESCRIPTOR is pooled as the networks are
RESAMPLES = 1000
KEPT_ALL = 0.9999  # cosine: what the descriptor cannot tell apart is left out even of the uncurated images
SCORECARD = "claims.md"
STEP_IMAGES = 4  # of a step of ViT-S/14: its time and memory


@dataclass(frozen=True)
class Measure:
    """A metric on one of the sample's sets, and the models that are measured by it."""

    title: str
    evalset: str
    protocol: str
    metric: str
    models: tuple[str, ...] = (CURATED, UNCURATED, STUDENTS, SCRATCH)


@dataclass(frozen=True)
class Claim:
    """One model is said to be better than another."""

    title: str
    ours: str
    other: str


@dataclass(frozen=True)
class Finding:
    """A claim by one measure.

    Attributes:
        ours: mean over seeds.
        other: likewise.
        difference: ours minus the other, mean over seeds, by test images.
        seeds: difference of each seed.
        holds: True or False where interval and all seeds agree; None: neither is shown.
    """

    claim: str
    measure: str
    metric: str
    ours: float
    other: float
    difference: Interval
    seeds: tuple[float, ...]
    holds: bool | None


CLAIMS = (
    Claim("Curated images beat the uncurated pool, at equal steps", CURATED, UNCURATED),
    Claim("A distilled student beats one trained from scratch, at equal steps", STUDENTS, SCRATCH),
    Claim("Frozen features beat random weights", CURATED, RANDOM),
    Claim("Frozen features beat histograms of colors and edges, pooled alike", CURATED, DESCRIPTOR),
    Claim("Frozen features beat histograms of whole images", CURATED, WHOLE),
)
MEASURES = (
    Measure("classification", "sample", "knn", "knn_top1"),
    Measure("classification, other light", "classification", "knn", "knn_top1"),
    Measure("retrieval", "retrieval", "retrieval", "retrieval_map_medium"),
    Measure("segmentation", "segmentation", "segmentation", "segmentation_image_miou"),
    Measure("depth, meters", "depth", "depth", "depth_rmse", (CURATED,)),
    Measure("75 corruptions", "classification", "robustness", "corruption_accuracy", (CURATED,)),
)
Values = Mapping[str, NDArray[np.float64]]  # model -> by test image


def prepare(folder: Path, recipe: Recipe) -> None:
    """Make the sample's pool, its own evaluation set and the four others.

    Raises:
        ConfigError: what the folder keeps was made with another recipe.
    """
    kept, text = folder / "recipe.json", recipe.model_dump_json(indent=2)
    if kept.exists() and kept.read_text() != text:
        raise ConfigError(f"{folder} keeps models of another recipe ({kept}); delete it or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, text.encode())
    if (folder / "data").is_dir():
        return
    with atomic_dir(folder / "made") as staging:
        make_collections(staging, None)
        build_sample_sets(staging / "sets")
        for source in sorted((staging / "sets").iterdir()):
            evaluation = staging / "data" / "evaluation"
            add_evalset(EvalsetRequest.parse(source=source, name=source.name, evaluation=evaluation))
    (folder / "made" / "data").rename(folder / "data")


def train(recipe: Recipe, folder: Path, seed: int) -> dict[str, Path]:
    """Train what is missing of one seed; return the weights folder of each model."""
    curated, uncurated, scratch = (folder / f"seed-{seed}" / name for name in (CURATED, UNCURATED, "scratch"))
    _stages(recipe, folder, curated, seed, recipe.curate)
    _once(curated / "models" / "students", lambda: distillation.run(recipe.distill, curated, seed, recipe.name))
    _stages(recipe, folder, uncurated, seed, _keep_all(recipe.curate))
    scratch.mkdir(exist_ok=True)
    _link(scratch / "data", curated / "data")
    _once(scratch / "models" / "pretrained", lambda: pretraining.run(from_scratch(recipe), scratch, seed))
    return {
        CURATED: curated / "models" / "adapted",
        UNCURATED: uncurated / "models" / "adapted",
        STUDENTS: curated / "models" / "students" / STUDENT,
        SCRATCH: scratch / "models" / "pretrained",
    }


def from_scratch(recipe: Recipe) -> PretrainConfig:
    """The pretraining of the student's shape, for as many steps, images and crops as its distillation."""
    own = recipe.distill
    changes = {
        "backbone": own.students[STUDENT].backbone,
        "steps": own.steps,
        "batch_size": own.batch_size,
        "crops": own.crops,
    }
    return recipe.pretrain.model_copy(update=changes)


def _stages(recipe: Recipe, folder: Path, root: Path, seed: int, curate: CurateConfig) -> None:
    for name in ("pool", "evaluation/sample"):
        _link(root / "data" / name, folder / "data" / name)
    layout = Layout(root)
    _once(layout.embeddings, lambda: curation.embed(recipe.embed, root, seed))
    _once(layout.curated, lambda: curation.curate(curate, root, seed))
    _once(layout.weights("pretrained"), lambda: pretraining.run(recipe.pretrain, root, seed))
    _once(layout.weights("adapted"), lambda: adaptation.run(recipe.adapt, root, seed))


def _keep_all(config: CurateConfig) -> CurateConfig:
    changes = {"dedup_similarity": KEPT_ALL, "decontamination_similarity": KEPT_ALL, "target_images": None}
    return config.model_copy(update=changes)


def _once(output: Path, work: Callable[[], object]) -> None:
    """Work unless its output is there, which appears whole or not at all."""
    if not output.exists():
        _say(f"{output.parent.parent.parent.name}/{output.parent.parent.name}: {output.name}")
        work()


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target.resolve())


def measured(recipe: Recipe, folder: Path, one: Measure, weights: Mapping[str, Path], seed: int) -> Values:
    """Return the values of one measure by test image for each model, from the folder or measured."""
    kept = folder / f"seed-{seed}" / f"{one.evalset}-{one.protocol}.json"
    if not kept.exists():
        _say(f"seed-{seed}: {one.title}")
        found = _compared(recipe, folder, one, weights, seed)
        values = {name: scores.by_image[one.metric].tolist() for name, scores in found.scores.items()}
        write_bytes(kept, json.dumps(values).encode())
    return {name: np.asarray(values) for name, values in json.loads(kept.read_bytes()).items()}


def _compared(recipe: Recipe, folder: Path, one: Measure, weights: Mapping[str, Path], seed: int) -> Comparison:
    evalset = read_named_set(folder / "data" / "evaluation", one.evalset)

    def scaling(shape: ViTConfig) -> Preprocessing:
        return scaled(recipe.evaluate.preprocessing, evalset, shape.patch_size)

    models = [load_model(name, weights[name], scaling) for name in one.models]
    models += baselines(models[0], seed)
    if evalset.config.task in ("classification", "retrieval"):
        whole = models[0].preprocessing.model_copy(update={"pooling": "cls"})
        models.append(ComparedModel(WHOLE, WHOLE, DescriptorEncoder(None), whole))
    return compare(evalset, models, [one.protocol], settings_for(evalset, recipe.evaluate), folder / "tokens", seed)


def findings(values: Mapping[Measure, Sequence[Values]]) -> list[Finding]:
    """Judge each claim by each measure that has both models; `values` has an entry for each seed."""
    return [
        _finding(claim, one, by_seed)
        for claim in CLAIMS
        for one, by_seed in values.items()
        if all({claim.ours, claim.other} <= set(models) for models in by_seed)
    ]


def _finding(claim: Claim, one: Measure, by_seed: Sequence[Values]) -> Finding:
    ours, other = (np.stack([models[name] for models in by_seed]) for name in (claim.ours, claim.other))  # [seeds, T]
    generator = np.random.default_rng(0)
    difference = difference_interval(ours.mean(axis=0), other.mean(axis=0), generator, RESAMPLES)
    seeds = tuple((ours - other).mean(axis=1).tolist())
    signs = {np.sign(value) for value in (difference.low, difference.high, *seeds)}
    holds = None if len(signs) > 1 or 0 in signs else (signs == {1.0}) != lower_is_better(one.metric)
    return Finding(
        claim.title, one.title, one.metric, float(ours.mean()), float(other.mean()), difference, seeds, holds
    )


TOLD = {True: "holds", False: "**the opposite holds**", None: "**not shown**"}


def markdown(found: Sequence[Finding]) -> str:
    """Return the scorecard as a table of Markdown."""
    lines = ["| claim | on | ours | other | difference (95 %) | of each seed | |", "|---|---|---|---|---|---|---|"]
    for one, before in zip(found, [None, *found], strict=False):
        claim = one.claim if before is None or before.claim != one.claim else ""
        bounds = f"{one.difference.mean:+.3f} ({one.difference.low:+.3f} to {one.difference.high:+.3f})"
        seeds = ", ".join(f"{value:+.3f}" for value in one.seeds)
        lines.append(
            f"| {claim} | {one.measure} | {one.ours:.3f} | {one.other:.3f} | {bounds} | {seeds} | {TOLD[one.holds]} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Finding], path: Path) -> None:
    """Draw the differences with their intervals, so that right is better, and one dot for each seed."""
    from matplotlib.figure import Figure

    claims = list(dict.fromkeys(one.claim for one in found))
    figure = Figure(figsize=(9, 0.3 * len(found) + 0.75 * len(claims)), layout="constrained")
    heights = [sum(one.claim == claim for one in found) for claim in claims]
    axes = figure.subplots(len(claims), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    colors = {True: "#2f7d4f", False: "#c8452e", None: "#6b7680"}
    for claim, plot in zip(claims, axes, strict=True):
        rows = [one for one in found if one.claim == claim]
        for place, one in enumerate(rows):
            sign = -1 if lower_is_better(one.metric) else 1
            low, high = sorted((sign * one.difference.low, sign * one.difference.high))
            plot.plot([low, high], [place, place], color=colors[one.holds], linewidth=2)
            plot.plot(sign * one.difference.mean, place, "o", color=colors[one.holds])
            plot.plot([sign * value for value in one.seeds], [place] * len(one.seeds), "|", color="black", markersize=7)
        plot.set_yticks(range(len(rows)), [one.measure for one in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.axvline(0, color="black", linewidth=0.8)
        plot.set_title(claim, loc="left", fontsize=10)
        plot.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("difference of the metric, right is better; bars: 95 % by images, ticks: seeds")
    figure.savefig(path, dpi=110)


def step_cost(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of a step of ViT-S/14 beside a plain one, as iBOT's code does it; kept in the folder."""
    kept = folder / "step.json"
    if not kept.exists():
        _say("step: time and memory")
        sides = {side: Side(side, precision="float32", batch_size=STEP_IMAGES) for side in ("ours", "plain")}
        costs = {name: dataclasses.asdict(cost) for name, cost in measure(sides).items()}
        write_bytes(kept, json.dumps(costs).encode())
    return json.loads(kept.read_bytes())


def write_scorecard(folder: Path, found: Sequence[Finding], step: Mapping[str, Mapping[str, float]]) -> None:
    """Write table, plot and JSON, after each seed those of the seeds so far."""
    ours, plain = step["ours"], step["plain"]
    text = markdown(found) + (
        f"\nA step of ViT-S/14 (float32, {STEP_IMAGES} images) takes {ours['seconds']:.1f} s and "
        f"{ours['peak_mib']:,.0f} MiB; written plainly, as in iBOT's code, {plain['seconds']:.1f} s and "
        f"{plain['peak_mib']:,.0f} MiB: {plain['seconds'] / ours['seconds']:.2f} times as fast, "
        f"{ours['peak_mib'] / plain['peak_mib']:.0%} of the memory.\n"
    )
    draw(found, folder / "claims.png")
    write_bytes(folder / SCORECARD, text.encode())
    write_bytes(folder / "claims.json", json.dumps([dataclasses.asdict(one) for one in found], indent=2).encode())


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(folder: Path) -> None:
    """Do what is missing, then print the scorecard."""
    logging.disable(logging.INFO)
    recipe = load_recipe(Path(), "tiny-cpu")
    prepare(folder, recipe)
    values = {one: list[Values]() for one in MEASURES}
    for seed in SEEDS:
        weights = train(recipe, folder, seed)
        for one, by_seed in values.items():
            by_seed.append(measured(recipe, folder, one, weights, seed))
        write_scorecard(folder, findings(values), step_cost(folder))
    sys.stdout.write((folder / SCORECARD).read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".pedigree/claims"))
