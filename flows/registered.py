"""Replace aliases of registered models in a recipe by exact versions.

MLflow is imported on first use, because `prefect deploy` imports the flows without needing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.core.references import ModelReference
from components.recipe import Recipe
from flows.git import WorkspaceError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def open_registry() -> MlflowClient:
    """Return the client of the registry, after a health check."""
    from components.registry.publish import one_line_errors, registry_client

    with one_line_errors():
        return registry_client()


def exact(recipe: Recipe, registry: MlflowClient) -> Recipe:
    """Return the recipe with aliases and current champions as exact versions, which makes them tracked inputs."""
    from components.registry.publish import one_line_errors

    with one_line_errors():
        return _exact(recipe, registry)


def _exact(recipe: Recipe, registry: MlflowClient) -> Recipe:
    from components.registry.standing import with_alias

    def version(name: str, alias: str) -> str | None:
        found = with_alias(registry, name, alias)
        return ModelReference.of_version(found).uri if found else None

    names = {model: recipe.name if model == "teacher" else f"{recipe.name}-{model}" for model in recipe.evaluate.models}
    champions = {model: found for model, name in names.items() if (found := version(name, "champion"))}
    if champions and not recipe.evaluate.champions:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"champions": champions})})
    teacher = Path(recipe.distill.teacher_weights)
    if teacher.is_absolute() and not teacher.is_dir():
        raise WorkspaceError(f"distill.teacher_weights: {teacher} is no folder; give one that holds weights")
    if (named := ModelReference.of_uri(recipe.distill.teacher_weights)) and named.alias:
        if (found := version(named.name, named.alias)) is None:
            raise WorkspaceError(f"distill.teacher_weights: {named.uri} names no registered version")
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher_weights": found})})
    exact = {}
    for key in ("embedder", "semantic"):
        config: Any = getattr(recipe.embed, key)
        weights = getattr(config, "weights", "")  # only of the kind `model`
        if (named := ModelReference.of_uri(weights)) and named.alias:
            if (found := version(named.name, named.alias)) is None:
                raise WorkspaceError(f"embed.{key}.weights: {weights} names no registered version")
            exact[key] = config.model_copy(update={"weights": found})
    if exact:
        recipe = recipe.model_copy(update={"embed": recipe.embed.model_copy(update=exact)})
    return recipe
