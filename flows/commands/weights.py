"""Weights that a command takes: a version of a registered model, or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local import supervisor

if TYPE_CHECKING:
    from components.registry.named_weights import NamedWeights

METAVAR = "NAME@ALIAS|NAME/NUMBER|WEIGHTS"
HELP = "A released model, a candidate, or a weights folder."


def named_weights(given: str) -> NamedWeights:
    """Weights as a person names them; the services are needed for registered ones only."""
    from components.registry.named_weights import find_weights, is_reference

    if is_reference(given):
        os.environ.update(supervisor.connect(Path.cwd(), start=False))
    return find_weights(given, Path.cwd())
