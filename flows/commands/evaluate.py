"""`pedigree evaluate`: a model beside others on one evaluation set, outside a run."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from components.core.config import ConfigError
from components.core.layout import Layout
from flows.commands.decorators import Answer, answer_console, command
from flows.commands.weights import HELP, METAVAR, named_weights
from flows.console import shown

if TYPE_CHECKING:
    from components.data.evalset import Evalset
    from components.evaluation.compare import ComparedModel, Comparison
    from components.evaluation.comparison_report import Verdict
    from components.evaluation.scores import Part
    from components.model.config import Preprocessing, ViTConfig
    from components.registry.named_weights import NamedWeights
    from flows.contamination import Contamination

SCHEMA = "pedigree-evaluation/1"


@command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar=METAVAR, help=HELP)],
    evalset: Annotated[str, typer.Option("--set", help="Name of an evaluation set; `pedigree evalset list`.")],
    protocol: Annotated[
        list[str] | None, typer.Option(help="Only this one; can be repeated. Default: those of one pass.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar=METAVAR, help="Another model beside it; can be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page there too.")] = None,
    seed: Annotated[int, typer.Option(help="Of trained heads and resamples.")] = 0,
) -> Answer:
    """Measure a model on an evaluation set beside others, random weights of its shape and a plain descriptor.

    Features are frozen and computed once: a second call, or another model
    beside this one, takes them from .pedigree/cache. The first lines say how
    many test images the model has been trained on, as far as that is known.

    Examples:
      pedigree evaluate pedigree@champion --set sample

      pedigree evaluate pedigree@latest --set birds --against pedigree@champion --html birds.html

      pedigree evaluate models/adapted --set streets --protocol segmentation --json
    """
    with shown(quiet=False):
        return _evaluate([model, *(against or ())], evalset, protocol or [], html, seed)


def _evaluate(names: list[str], asked: str, protocols: list[str], html: Path | None, seed: int) -> Answer:
    from components.core.storage import write_bytes
    from components.evaluation.compare import baselines, compare, load_model
    from components.evaluation.comparison_report import notes, verdicts, write_page
    from components.evaluation.cost import pass_cost
    from components.evaluation.settings import settings_for
    from components.recipe import load_recipe
    from flows.contamination import contamination

    root = Path.cwd()
    found = find_set(root, asked)
    weights = [named_weights(name) for name in names]
    recipe = load_recipe(root, None)
    settings = settings_for(found, recipe.evaluate)
    given = [load_model(one.name, one.folder, partial(scaled, one, found)) for one in weights]
    models = [*given, *baselines(given[0], seed)]
    compared = compare(found, models, protocols, settings, Layout(root).cache("tokens"), seed)
    seen = {one.name: contamination(one.name if _registered(one) else None, found, root) for one in weights}
    costs = {
        one.name: pass_cost(compared.tokens[one.name].device_seconds, one.device, recipe.pretrain.monitor.energy)
        for one in given
    }
    facts = [_about(found), *map(_how_scaled, given), *(f"{name}: {one.line()}" for name, one in seen.items())]
    facts += [f"{name}: {one.line()}" for name, one in costs.items()]
    facts += [*filter(None, (one.assumed for one in weights)), *settings.lines(compared.protocols), *notes(compared)]
    told = verdicts(compared, seed)
    if html is not None:
        write_bytes(html, write_page(compared, models, facts, settings, seed))
    data = _data(compared, told, seen, facts, seed)
    data["costs"] = {name: dataclasses.asdict(one) for name, one in costs.items()}
    return Answer(data, partial(_show, compared, told, facts, html))


def find_set(root: Path, name: str) -> Evalset:
    """Return the one snapshot of a named set.

    Raises:
        ConfigError: no such set.
    """
    from components.data.evalset import read_evalset
    from components.data.manifest import MANIFEST

    folder = Layout(root).evaluation
    there = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{MANIFEST}")})
    snapshots = sorted((folder / name).glob(f"*/{MANIFEST}")) if name in there else []
    if not snapshots:
        raise ConfigError(f"--set {name}: no such set; there are {', '.join(there) or 'none'}: `pedigree evalset list`")
    if len(snapshots) > 1:
        listed = ", ".join(path.parent.name for path in snapshots)
        raise ConfigError(f"--set {name}: {len(snapshots)} snapshots ({listed}); a set that is measured has one")
    return read_evalset(snapshots[0].parent)


def _registered(weights: NamedWeights) -> bool:
    from components.registry.named_weights import is_reference

    return is_reference(weights.name)


def scaled(weights: NamedWeights, evalset: Evalset, shape: ViTConfig) -> Preprocessing:
    """Return how a model's images are scaled: as evaluated, but the whole middle square where places are compared."""
    resolution = evalset.config.resolution
    if resolution is not None:
        resolution = max(shape.patch_size, resolution // shape.patch_size * shape.patch_size)
    found = weights.preprocessing_at(resolution, shape)
    whole = evalset.config.task not in ("classification", "video")
    return found.model_copy(update={"resize_size": found.crop_size}) if whole else found


def _about(evalset: Evalset) -> str:
    asked = evalset.config.resolution
    at = f", made for {asked} pixels" if asked else ""
    learned, labels = evalset.learned, evalset.images.labels
    what = "images" if evalset.clips is None else "clips"
    if learned is not None and labels is not None and labels.predictable is not None:
        at += f"; trained on {learned.folder.parent.name} {learned.version}, and only the {len(labels.predictable)} of "
        at += f"its {len(labels.classes)} classes that the set has can be predicted"
    return (
        f"{evalset.folder.parent.name} {evalset.version}, {evalset.config.task}, {evalset.config.license}: "
        f"{len(evalset.train):,} train and {len(evalset.test):,} test {what}{at}"
    )


def _how_scaled(model: ComparedModel) -> str:
    """Return the size of a model's images as a line; its patches may not tile what the set asks for."""
    scaling = model.preprocessing
    return f"{model.name}: shorter side {scaling.resize_size} pixels, crop {scaling.crop_size}"


def _data(
    found: Comparison, told: list[Verdict], seen: dict[str, Contamination], facts: list[str], seed: int
) -> dict[str, Any]:
    from components.evaluation.comparison_report import interval_differences, parts_by_model

    judged = [{**dataclasses.asdict(one), "difference": _plain(dataclasses.asdict(one.difference))} for one in told]
    compared, clusters = interval_differences(found, seed), found.evalset.clusters
    return {
        "schema": SCHEMA,
        "set": {"name": found.evalset.folder.parent.name, "version": found.evalset.version},
        "task": found.evalset.config.task,
        "protocols": found.protocols,
        "scores": {name: scores.metrics for name, scores in found.scores.items()},
        "intervals": {
            name: {metric: dataclasses.asdict(one) for metric, one in scores.intervals(clusters).items()}
            for name, scores in found.scores.items()
        },
        "differences": {
            other: {metric: dataclasses.asdict(one) for metric, one in values.items()}
            for other, values in compared.items()
        },
        "parts": {
            name: {what: [_part(one) for one in each] for what, each in parts.items()}
            for name, parts in parts_by_model(found, seed).items()
        },
        "corruptions": {
            name: {corruption: values.tolist() for corruption, values in scores.curves.items()}
            for name, scores in found.scores.items()
            if scores.curves
        },
        "verdicts": judged,
        "notes": {name: scores.notes for name, scores in found.scores.items()},
        "contamination": {name: dataclasses.asdict(one) for name, one in seen.items()},
        "facts": facts,
    }


def _part(part: Part) -> dict[str, Any]:
    score = _plain(dataclasses.asdict(part.score))
    return {"name": part.name, "num_images": part.num_images, "score": score}


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _show(found: Comparison, told: list[Verdict], facts: list[str], html: Path | None) -> None:
    console, model = answer_console(), next(iter(found.scores))
    for one in told:
        style = {True: "green", False: "bold red", None: "yellow"}[one.better]
        console.print(one.line(model), style=style, markup=False)
    for fact in facts:
        console.print(fact, markup=False)
    certain = {name: scores.intervals(found.evalset.clusters) for name, scores in found.scores.items()}
    table = Table("metric", *found.scores, box=None, pad_edge=False)
    for metric in dict.fromkeys(metric for scores in found.scores.values() for metric in scores.metrics):
        cells = []
        for name, scores in found.scores.items():
            value, bounds = scores.metrics.get(metric), certain[name].get(metric)
            between = f" ({bounds.low:.3f} to {bounds.high:.3f})" if bounds else ""
            cells.append("" if value is None else f"{value:.4g}{between}")
        table.add_row(metric, *cells)
    console.print(table, soft_wrap=False)
    if html is not None:
        console.print(f"page  {html}", markup=False)
