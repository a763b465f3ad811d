"""All parameters of a run, as in `params.yaml` and in recipe files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from components.adaptation.config import AdaptConfig
from components.core.config import Config, ConfigError, apply_overrides, load_yaml, validate
from components.core.layout import RELATIVE
from components.curation.config import CurateConfig, EmbedConfig
from components.distillation.config import DistillConfig
from components.evaluation.config import EvaluateConfig
from components.pretraining.config import PretrainConfig
from components.registry.config import GatesConfig, RegisterConfig
from components.training.config import TrainingConfig, check_crops_fit, check_divisible

RECIPES = Path(__file__).parent / "recipes"
PARAMS_FILE = str(RELATIVE.params)
PRETRAINED, ADAPTED = str(RELATIVE.weights("pretrained")), str(RELATIVE.weights("adapted"))
STEPS = ("pretrain.steps=", "adapt.steps=", "distill.steps=")

logger = logging.getLogger(__name__)


class Recipe(Config):
    """All parameters of a run, one section per stage."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=60)  # of the registered model
    seed: int = Field(ge=0, lt=2**31)
    embed: EmbedConfig
    curate: CurateConfig
    pretrain: PretrainConfig
    adapt: AdaptConfig
    distill: DistillConfig
    evaluate: EvaluateConfig
    gates: dict[str, GatesConfig] = Field(default_factory=dict)  # by model, as in evaluate.models

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        made = {"teacher": ADAPTED, **{name: str(RELATIVE.students / name) for name in self.distill.students}}
        models = self.evaluate.models
        if any(models.get(name) != folder for name, folder in made.items()):
            raise ValueError(f"evaluate.models must hold all that is registered, {made}, but is {models}")
        unknown = sorted(set(models.values()) - {PRETRAINED, *made.values()})
        if unknown:
            raise ValueError(f"evaluate.models: this recipe makes no {unknown[0]}")
        patches = {"pretrain": self.pretrain.backbone.patch_size}
        patches |= {f"distill.students.{name}": s.backbone.patch_size for name, s in self.distill.students.items()}
        crop_size = self.evaluate.preprocessing.crop_size
        for section, patch in patches.items():
            check_divisible("evaluate.preprocessing.crop_size", crop_size, f"{section}.backbone.patch_size", patch)
        return self

    @model_validator(mode="after")
    def _stages_fit_what_pretraining_makes(self) -> Self:
        patch = self.pretrain.backbone.patch_size
        check_crops_fit(self.adapt.crops, patch, "pretrain.backbone", "adapt.")
        for name, student in self.distill.students.items():
            if self.distill.teacher_weights == ADAPTED and student.backbone.patch_size != patch:
                raise ValueError(
                    f"distill.students.{name}.backbone.patch_size is {student.backbone.patch_size}, that of the "
                    f"teacher (pretrain.backbone) is {patch}: patches are compared one to one, so they must be equal"
                )
        return self

    @model_validator(mode="after")
    def _scores_are_made(self) -> Self:
        limit = self.curate.filters.max_nsfw
        if limit is not None and self.embed.scores.nsfw is None:
            advice = "give embed.scores.nsfw a classifier, such as {kind: opennsfw}, or leave max_nsfw out"
            raise ValueError(f"curate.filters.max_nsfw is {limit}, but embed scores no such thing; {advice}")
        return self

    @model_validator(mode="after")
    def _gates_are_of_models(self) -> Self:
        if unknown := sorted(set(self.gates) - set(self.evaluate.models)):
            raise ValueError(f"gates: {unknown[0]!r} is not among evaluate.models {sorted(self.evaluate.models)}")
        return self

    def registration(self) -> RegisterConfig:
        """Return the settings of the register stage."""
        evaluate = self.evaluate
        return RegisterConfig(preprocessing=evaluate.preprocessing, gates=self.gates, champions=evaluate.champions)

    def trainings(self) -> dict[str, TrainingConfig]:
        """Return the configurations of the training stages, by name."""
        return {"pretrain": self.pretrain, "adapt": self.adapt, "distill": self.distill}


def recipe_names() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(root: Path, name: str | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate the named recipe, or `root`'s `params.yaml`, with `KEY=VALUE` overrides.

    Raises:
        ConfigError: an unknown recipe, an unreadable file, or a value that is not allowed.
    """
    path = root / PARAMS_FILE if name is None else RECIPES / f"{name}.yaml"
    if name is not None and name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}; known recipes: {', '.join(recipe_names())}")
    values, given = load_yaml(path), list(overrides)
    return validate(Recipe, apply_overrides(values, [*_shortened(values, given), *given]), path.name)


def _shortened(values: dict[str, Any], overrides: list[str]) -> Iterator[str]:
    """Yield overrides that scale the initial phases of trainings that an override shortens."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    longer = [override for override in overrides if not override.strip().startswith(STEPS)]
    if len(longer) == len(overrides):
        return
    try:
        before = validate(Recipe, apply_overrides(values, longer), PARAMS_FILE)
    except ConfigError:  # reported later, with all overrides applied
        return
    after = apply_overrides(values, overrides)
    for stage, config in before.trainings().items():
        steps = after[stage].get("steps")
        if f"{stage}.steps" not in keys or not isinstance(steps, int | float) or not 0 < steps < config.steps:
            continue
        steps = int(steps)
        chosen = [key.removeprefix(f"{stage}.") for key in keys]
        phases = {key: old for key, old in config.phases().items() if not {key, key.partition(".")[0]} & {*chosen}}
        shorter = {key: old * steps // config.steps for key, old in phases.items()}
        changes = [f"{key} {phases[key]} -> {new}" for key, new in shorter.items() if new != phases[key]]
        if changes:
            _log_once(f"{stage}.steps is {steps} instead of {config.steps}, so in proportion: {', '.join(changes)}")
        yield from (f"{stage}.{key}={new}" for key, new in shorter.items() if new != phases[key])


@cache
def _log_once(line: str) -> None:
    """Log a line once per process, because a run reads its recipe several times."""
    logger.info(line)
