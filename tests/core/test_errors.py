"""One root for every error that is no defect."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

PROJECT = Path(__file__).parents[2]
BUILTIN = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
ROOT = "PedigreeError"
FOREIGN = "RequestError"  # of the registered model: MLflow's scoring server answers 400 to its own class only


def bases() -> dict[str, list[str]]:
    """The classes of the code, by name, with the names of what they derive from."""
    files = [path for folder in ("components", "flows", "infra") for path in (PROJECT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    return {node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases] for node in classes}


def test_all_errors_derive_from_one_root():
    found = bases()
    errors = {name for name, above in found.items() if BUILTIN & set(above)}
    assert errors == {ROOT, FOREIGN}
    while new := {name for name, above in found.items() if errors & set(above)} - errors:
        errors |= new
    assert {name for name in found if name.endswith(("Error", "Failed"))} == errors
    assert {"ConfigError", "StorageError", "StackError", "StageUnreachableError"} < errors
