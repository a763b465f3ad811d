"""Functions of the stages by name, and those called before and after a training.

They are names rather than imports, so that each stage loads only its own code, which `lineage.code` can determine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

PREPARE_STREAM = "components.lineage.streaming:prepare_stream"
FORGET = "components.training.delivery:forget"
STAGES = {  # first the stage's function
    "embed": ("components.curation.stage:embed",),
    "curate": ("components.curation.stage:curate",),
    "pretrain": ("components.pretraining.stage:run", PREPARE_STREAM, FORGET),
    "adapt": ("components.adaptation.stage:run", PREPARE_STREAM, FORGET),
    "distill": ("components.distillation.stage:run", PREPARE_STREAM, FORGET),
    "evaluate": ("components.evaluation.stage:run",),
    "register": ("components.registry.stage:run",),
}

SAVES_MEMORY = {  # by stage; trainings share their advice
    "embed": "lower embed.workers, or batch_size of its embedders",
    "curate": "lower curate.workers",
    "evaluate": "lower evaluate.batch_size or evaluate.num_workers",
}


def memory_advice(command: Iterable[str]) -> str:
    """Return advice on out-of-memory for the stage that a command line names."""
    stage = next((word for word in command if word in STAGES), "")
    if PREPARE_STREAM in STAGES.get(stage, ()):
        return f"lower {stage}.batch_size or {stage}.stream.num_workers, or set {stage}.activation_checkpointing=full"
    return SAVES_MEMORY.get(stage, "free some memory, then run again")


def load(name: str) -> Callable[..., Any]:
    """Import the function that `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
