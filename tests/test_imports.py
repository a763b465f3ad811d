"""What the front door and the parameters must not load, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("**/config.py", "**/*_config.py", "recipe.py")
    for path in (ROOT / "components").glob(pattern)
)


def loaded(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_starts_without_heavy_libraries():
    found = loaded("flows.cli")
    assert {"flows", "typer"} <= found
    assert not found & {"torch", "prefect", "mlflow", "dvc"}


def test_parameters_load_no_torch():
    assert "torch" not in loaded(*CONFIGS)


@pytest.mark.parametrize(
    ("module", "without"),
    [("components.curation.stage", {"torch", "matplotlib"}), ("flows.retrain", {"torch", "mlflow"})],
)
def test_what_costs_seconds_is_loaded_where_it_is_used(module, without):
    assert not loaded("components.cli", module) & without


def test_every_stage_has_parameters():
    assert {f"components.{name}.config" for name in ("curation", "training", "evaluation")} <= set(CONFIGS)
