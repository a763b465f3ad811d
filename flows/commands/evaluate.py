"""`pedigree evaluate`: a model beside others on one evaluation set, outside a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from components.core.config import ConfigError
from components.core.layout import Layout
from flows.commands.decorators import Answer, answer_console, command
from flows.commands.weights import METAVAR, named_weights
from flows.console import shown

if TYPE_CHECKING:
    from components.data.evalset import Evalset
    from components.evaluation.compare import ComparedModel, Comparison
    from components.evaluation.comparison_report import Verdict
    from components.evaluation.scores import Part
    from components.model.config import Preprocessing, ViTConfig
    from flows.contamination import Contamination

SCHEMA = "pedigree-evaluation/1"
ANY_MODEL = f"{METAVAR}|PATH"
HELP = "A released model, a candidate, a weights folder, or a model of another program by its path."


@dataclass(frozen=True)
class _Given:
    """A model that was named: lines on it, and its reference where a registry knows it."""

    model: ComparedModel
    facts: Sequence[str]
    reference: str | None


@command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar=ANY_MODEL, help=HELP)],
    evalset: Annotated[str, typer.Option("--set", help="Name of an evaluation set; `pedigree evalset list`.")],
    protocol: Annotated[
        list[str] | None, typer.Option(help="Only this one; can be repeated. Default: those of one pass.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar=ANY_MODEL, help="Another model beside it; can be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page there too.")] = None,
    seed: Annotated[int, typer.Option(help="Of trained heads and resamples.")] = 0,
) -> Answer:
    """Measure a model on an evaluation set beside others, random weights of its shape and a plain descriptor.

    Features are frozen and computed once: a second call, or another model
    beside this one, takes them from .pedigree/cache. The first lines say how
    many test images the model has been trained on, as far as that is known.

    A model of another program is given by its path, and nothing is downloaded:
    a folder that transformers or timm has saved (config.json and .safetensors;
    the library must be installed), an .onnx file, or a TorchScript file (.pt,
    .ts). The last is a program that runs with your rights: give only one that
    you trust. Sizes and colors of its images are those that it states, in
    preprocessor_config.json, in timm's config.json or in our own export.

    Examples:
      pedigree evaluate pedigree@champion --set sample

      pedigree evaluate pedigree@latest --set birds --against pedigree@champion --html birds.html

      pedigree evaluate models/adapted --set streets --protocol segmentation --json

      pedigree evaluate pedigree@latest --set birds --against ~/dinov2-small --against exported.onnx
    """
    with shown(quiet=False):
        return _evaluate([model, *(against or ())], evalset, protocol or [], html, seed)


def _evaluate(names: list[str], asked: str, protocols: list[str], html: Path | None, seed: int) -> Answer:
    from components.core.storage import write_bytes
    from components.evaluation.compare import RANDOM, baselines, compare
    from components.evaluation.comparison_report import notes, verdicts, write_page
    from components.evaluation.cost import pass_cost
    from components.evaluation.facts import about, how_scaled
    from components.evaluation.settings import settings_for
    from components.recipe import load_recipe
    from flows.contamination import contamination

    root = Path.cwd()
    found = find_set(root, asked)
    recipe = load_recipe(root, None)
    settings = settings_for(found, recipe.evaluate)
    given = [_load(name, found) for name in names]
    models = [one.model for one in given]
    models += baselines(models[0], seed)
    compared = compare(found, models, protocols, settings, Layout(root).cache("tokens"), seed)
    seen = {one.model.name: contamination(one.reference, found, root) for one in given}
    energy = recipe.pretrain.monitor.energy
    costs = {
        one.model.name: pass_cost(compared.tokens[one.model.name].device_seconds, one.model.encoder.device, energy)
        for one in given
    }
    facts = [about(found), *(how_scaled(one.model) for one in given)]
    facts += [f"{name}: {one.line()}" for name, one in seen.items()]
    facts += [f"{name}: {one.line()}" for name, one in costs.items()]
    facts += [fact for one in given for fact in one.facts]
    if RANDOM not in compared.scores:
        facts.append(f"no random weights beside it: {names[0]} has no shape apart from its weights")
    facts += [*settings.lines(compared.protocols), *notes(compared)]
    told = verdicts(compared, seed)
    if html is not None:
        write_bytes(html, write_page(compared, models, facts, settings, seed))
    data = _data(compared, told, seen, facts, seed)
    data["costs"] = {name: dataclasses.asdict(one) for name, one in costs.items()}
    return Answer(data, partial(_show, compared, told, facts, html))


def find_set(root: Path, name: str) -> Evalset:
    """Read a named set.

    Raises:
        ConfigError: no such set.
        DatasetError: it cannot be measured.
    """
    from components.data.evalsets import read_named_set, set_names

    folder = Layout(root).evaluation
    there = set_names(folder)
    if name not in there:
        raise ConfigError(f"--set {name}: no such set; there are {', '.join(there) or 'none'}: `pedigree evalset list`")
    return read_named_set(folder, name)


def _load(name: str, evalset: Evalset) -> _Given:
    from components.evaluation.compare import load_model
    from components.evaluation.external import external_kind, load_external
    from components.evaluation.settings import scaled
    from components.registry.named_weights import is_reference

    registered = is_reference(name)
    if not registered and (kind := external_kind(name)) is not None:
        external = load_external(name, kind, evalset)
        return _Given(external.model, external.facts, None)
    weights = named_weights(name)

    def scaling(shape: ViTConfig) -> Preprocessing:
        return scaled(weights.preprocessing_at(None, shape), evalset, shape.patch_size)

    model = load_model(weights.name, weights.folder, scaling)
    return _Given(model, [weights.assumed] if weights.assumed else [], weights.name if registered else None)


def _data(
    found: Comparison, told: list[Verdict], seen: dict[str, Contamination], facts: list[str], seed: int
) -> dict[str, Any]:
    from components.evaluation.comparison_report import interval_differences, parts_by_model

    judged = [{**dataclasses.asdict(one), "difference": _plain(dataclasses.asdict(one.difference))} for one in told]
    compared, clusters = interval_differences(found, seed), found.evalset.clusters
    return {
        "schema": SCHEMA,
        "set": {"name": found.evalset.name, "version": found.evalset.version},
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
