"""Parameters of the registration: the images' preprocessing, and the gates before a promotion. No torch here."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from components.core.config import Config
from components.core.metric_names import lower_is_better
from components.model.config import Preprocessing


class GatesConfig(Config):
    """What a model must hold before it becomes the champion; a metric is named as in the evaluation's result.json."""

    tolerance: dict[str, NonNegativeFloat] = Field(default_factory=dict)  # by metric: how much worse than the champion
    floors: dict[str, float] = Field(default_factory=dict)  # by metric: the least value; one that is not measured fails
    ceilings: dict[str, float] = Field(default_factory=dict)  # by metric of which lower is better: the greatest value
    max_size_mib: PositiveFloat | None = None  # of the weights
    max_latency_ms: PositiveFloat | None = None  # of one image, on the machine that registers
    second_person: bool = False  # whoever started the run may not promote what it made

    @model_validator(mode="after")
    def _limits_are_on_the_worse_side(self) -> Self:
        if wrong := [metric for metric in self.floors if lower_is_better(metric)]:
            raise ValueError(f"floors: of {wrong[0]} lower is better; give its greatest value under ceilings")
        if wrong := [metric for metric in self.ceilings if not lower_is_better(metric)]:
            raise ValueError(f"ceilings: of {wrong[0]} higher is better; give its least value under floors")
        return self


class RegisterConfig(Config):
    """What the register stage reads of a recipe."""

    preprocessing: Preprocessing = Preprocessing()
    gates: dict[str, GatesConfig] = Field(default_factory=dict)  # by model, as in evaluate.models
    champions: dict[str, str] = Field(default_factory=dict)  # by model: the version that it was evaluated beside
