"""Parameters of the registration: the images' preprocessing, and the gates before a promotion. No torch here."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat

from components.core.config import Config
from components.model.config import Preprocessing

MEASURES = ("knn_top1", "linear_top1", "instance_recall_at_1", "instance_map", "effective_rank")  # asked for first


class GatesConfig(Config):
    """What a model must hold before it becomes the champion; a metric is named as in the evaluation's result.json."""

    tolerance: dict[str, NonNegativeFloat] = Field(default_factory=dict)  # by metric, below the champion; others 0
    floors: dict[str, float] = Field(default_factory=dict)  # by metric: the least value; one that is not measured fails
    max_size_mib: PositiveFloat | None = None  # of the weights
    max_latency_ms: PositiveFloat | None = None  # of one image, on the machine that registers
    second_person: bool = False  # whoever started the run may not promote what it made


class RegisterConfig(Config):
    """What the register stage reads of a recipe."""

    preprocessing: Preprocessing = Preprocessing()
    gates: dict[str, GatesConfig] = Field(default_factory=dict)  # by model, as in evaluate.models
    champions: dict[str, str] = Field(default_factory=dict)  # by model: the version that it was evaluated beside
