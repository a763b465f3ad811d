"""Which model a command answers for: the one that a person names, else the champion."""

from __future__ import annotations

from pathlib import Path

from components.core.config import ConfigError, load_yaml
from components.core.layout import Layout
from components.core.references import ModelReference
from components.lineage.champions import CHAMPION


def asked_model(reference: str | None, model: str | None, root: Path) -> str:
    """Return the reference given as argument or as option, else that of the champion.

    Raises:
        ConfigError: both are given and differ, or none is and `params.yaml` names no model.
    """
    if reference and model and reference != model:
        raise ConfigError(f"{reference} and --model {model}: give one model")
    if given := reference or model:
        return given
    if (found := champion_of(root)) is None:
        raise ConfigError(f"{Layout(root).params}: names no model, so there is no champion; give --model NAME@ALIAS")
    return found


def champion_of(root: Path) -> str | None:
    """Return `NAME@champion` of the model that `params.yaml` names; None without that file or name."""
    path = Layout(root).params
    name = load_yaml(path).get("name") if path.is_file() else None
    return str(ModelReference(name, CHAMPION)) if isinstance(name, str) else None
