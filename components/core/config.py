"""Base class of all config models: strict validation, loading with overrides, and actionable errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from components.core.errors import InputError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of all config models: frozen, unknown keys refused, every value validated (defaults too).

    A section whose defaults differ between stages has one class per stage, so that a partly given section keeps the
    other defaults of its stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ConfigError(InputError):
    """A parameter file or override that cannot be used; the message says which key and what is allowed."""


def parse_yaml(text: str | bytes) -> Any:
    """Parse YAML, by libyaml where PyYAML has it, which takes an eighth of the time.

    Raises:
        YAMLError: it is invalid.
    """
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        data = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return cast("dict[str, Any]", data)


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `values` with `a.b.c=value` overrides set; each value is read as YAML.

    Raises:
        ConfigError: an override lacks `=`, or its path passes through a value that is not a mapping.
    """
    result = {key: _unshared(value) for key, value in values.items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example pretrain.steps=100")
        *parents, leaf = key.strip().split(".")
        node = result
        for parent in parents:
            child: Any = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: {parent} is a value, not a section")
            node = cast("dict[str, Any]", child)
        node[leaf] = _yaml_value(text)
    return result


def validate(model: type[ConfigT], values: Mapping[str, Any], origin: str) -> ConfigT:
    """Build `model` from `values`.

    Raises:
        ConfigError: one line for each problem, naming the key, what was given and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, origin, dict(item)) for item in error.errors())) from None


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set: {text!r} is not a YAML value, such as 3, 2e-4, true or [1, 2]") from None
    if isinstance(value, str):  # YAML 1.1 reads 2e-4 as text; the user means a number.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unshared(node: Any) -> Any:
    """Return a copy in which sections that a YAML anchor shares are separate (`deepcopy` keeps them shared)."""
    if not isinstance(node, dict):
        return node
    return {key: _unshared(value) for key, value in cast("dict[str, Any]", node).items()}


def _explain(model: type[BaseModel], origin: str, item: Mapping[str, Any]) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path) or "(whole file)"
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{origin}: {key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{origin}: {key}: required, but not given"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{origin}: {key}: {message}{given}"


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the keys (aliases first) of the config models that `path` leads to from `model`; a union has several."""
    models = [model]
    for part in path:
        found = [field for m in models for name, field in m.model_fields.items() if part in (name, field.alias)]
        if found:
            models = [m for field in found for m in _models_in(field.annotation)]
        else:  # a list index, a mapping key, or the discriminator of a union
            models = [m for m in models if part in _kinds(m)] or models
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
