"""Names of registered model versions, runs, commits and data, and how to parse them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

URI = "models:/"  # prefix that distinguishes a registered model from a folder
CANDIDATES = "-candidates"  # training adds versions to the model NAME-candidates
LATEST = "latest"  # alias of the newest version, set by MLflow
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of models that a run registers
RUN_ID = re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{4}\b")  # also of its branch: runs/ID
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
DATA_ID = re.compile(r"[0-9a-f]{32}(?:\.dir)?")  # DVC's id of a file or folder
IMAGE_ID = re.compile(r"[0-9a-f]{64}")  # SHA-256 of the encoded image

_ANY_NAME, _NUMBER = r"[^/@]+", r"\d+"
EXACT_URI = rf"^{URI}{_ANY_NAME}/{_NUMBER}$"  # no alias: an input must not change
_OWN = re.compile(rf"(?P<name>{MODEL_NAME.pattern})(?:@(?P<alias>[\w-]+)|/(?P<version>{_NUMBER}))")
_OF_URI = re.compile(rf"{URI}(?P<name>{_ANY_NAME})(?:@(?P<alias>{_ANY_NAME})|/(?P<version>{_NUMBER}))")


@dataclass(frozen=True)
class ModelReference:
    """A version of a registered model, by alias (which may move) or by number."""

    name: str
    alias: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse `NAME@ALIAS` or `NAME/NUMBER` of a Pedigree model; return None for any other text.

        `NAME@latest` is the newest candidate, as `NAME-candidates@latest` is.
        """
        found = _OWN.fullmatch(text)
        if found is None:
            return None
        name, alias = found["name"], found["alias"]
        newest = alias == LATEST and not name.endswith(CANDIDATES)
        return cls(name + CANDIDATES if newest else name, alias, found["version"])

    @classmethod
    def of_uri(cls, text: str) -> Self | None:
        """Parse `models:/NAME@ALIAS` or `models:/NAME/NUMBER` of any model; return None for any other text."""
        found = _OF_URI.fullmatch(text)
        return cls(**found.groupdict()) if found else None

    @classmethod
    def of_version(cls, version: Any) -> Self:
        """Return the reference, by number, of a version as MLflow's client returns it."""
        return cls(version.name, version=str(version.version))

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}" if self.alias else f"{self.name}/{self.version}"

    @property
    def is_candidate(self) -> bool:
        """Whether it is of a model to which training adds versions."""
        return self.name.endswith(CANDIDATES)

    @property
    def model(self) -> str:
        """Name of the released model."""
        return self.name.removesuffix(CANDIDATES)

    @property
    def uri(self) -> str:
        """The reference as a `models:/` URI."""
        return f"{URI}{self}"

    def find(self, client: Any) -> Any:
        """Return MLflow's version; raise MlflowException if there is none.

        Asked for a version of a model that is not there, MLflow answers "permission denied" to all but its admins, so
        the model is asked for first.
        """
        client.get_registered_model(self.name)
        if self.alias:
            return client.get_model_version_by_alias(self.name, self.alias)
        return client.get_model_version(self.name, str(self.version))


def is_registered(weights: str) -> bool:
    """Return whether weights are given as a registered version rather than as a folder."""
    return weights.startswith(URI)
