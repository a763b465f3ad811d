"""How versions of registered models, runs, commits and data are named, and told apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

URI = "models:/"  # before a reference it tells a registered model from a folder
CANDIDATES = "-candidates"  # the model to which training adds versions is called NAME-candidates
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of models that a run registers
RUN_ID = re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{4}\b")  # also of its branch: runs/ID
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
DATA_ID = re.compile(r"[0-9a-f]{32}(?:\.dir)?")  # of a file or a folder, as DVC names its bytes
IMAGE_ID = re.compile(r"[0-9a-f]{64}")  # SHA-256 of the encoded image

_ANY_NAME, _NUMBER = r"[^/@]+", r"\d+"
EXACT_URI = rf"^{URI}{_ANY_NAME}/{_NUMBER}$"  # never an alias: an input must not move
_OWN = re.compile(rf"(?P<name>{MODEL_NAME.pattern})(?:@(?P<alias>[\w-]+)|/(?P<version>{_NUMBER}))")
_OF_URI = re.compile(rf"{URI}(?P<name>{_ANY_NAME})(?:@(?P<alias>{_ANY_NAME})|/(?P<version>{_NUMBER}))")


@dataclass(frozen=True)
class ModelReference:
    """A version of a registered model: by an alias, which may move, or by its number."""

    name: str
    alias: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `NAME@ALIAS` or `NAME/NUMBER`, as a person names a model of ours; None: the text is neither."""
        found = _OWN.fullmatch(text)
        return cls(**found.groupdict()) if found else None

    @classmethod
    def of_uri(cls, text: str) -> Self | None:
        """Read `models:/NAME@ALIAS` or `models:/NAME/NUMBER`, of whatever model; None: the text is neither."""
        found = _OF_URI.fullmatch(text)
        return cls(**found.groupdict()) if found else None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}" if self.alias else f"{self.name}/{self.version}"

    @property
    def is_released(self) -> bool:
        """Whether it names a model that people release, and not one to which training adds versions."""
        return not self.name.endswith(CANDIDATES)

    @property
    def uri(self) -> str:
        """The reference as MLflow and our configuration write it."""
        return f"{URI}{self}"

    def find(self, client: Any) -> Any:
        """Ask MLflow's client for the version; raises MlflowException where there is none.

        Asked for a version of a model that is not there, MLflow answers "permission denied" to all but its admins, so
        the model is asked for first.
        """
        client.get_registered_model(self.name)
        if self.alias:
            return client.get_model_version_by_alias(self.name, self.alias)
        return client.get_model_version(self.name, str(self.version))


def is_registered(weights: str) -> bool:
    """Whether weights are given as a version of a registered model, rather than as a folder."""
    return weights.startswith(URI)
