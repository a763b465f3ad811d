"""Write the code fingerprints of each stage, which are inputs in `dvc.yaml`: `python -m components.lineage.code`.

A line of `reports/code/STAGE.txt` is a file that the stage can import and a SHA-256: for a module, of its syntax tree,
so that comments, docstrings and layout do not count; for any other file, of its bytes. Importable files are those that
the stage's entry in `components.stages` and the command line import, at the top or inside functions, transitively. DVC
runs this whenever a byte of `components` changes, so the lists are never out of date.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from components.core.errors import InputError
from components.core.layout import RELATIVE
from components.core.storage import write_bytes
from components.stages import STAGES

STAGE = "code"  # in dvc.yaml; bookkeeping only
PACKAGE = "components"
COMMAND_LINE = "components.__main__"
# They name every stage. What a stage needs of `recipe` are its own config models, which the stage imports itself.
NOT_FOLLOWED = ("components/recipe.py", "components/stages.py")
BY_NAME = ("import_module", "__import__")  # functions that import by name


class Code:
    """All files of the package below `root`.

    Args:
        root: the folder that holds `components`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module] = {}

    @cached_property
    def files(self) -> frozenset[str]:
        """Paths of all files that DVC tracks as code (see .dvcignore), relative to `root`."""
        found = (path.relative_to(self.root) for path in (self.root / PACKAGE).rglob("*") if path.is_file())
        return frozenset(p.as_posix() for p in found if "__pycache__" not in p.parts and p.suffix != ".md")

    def fingerprints(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of each file that the named modules can import, including themselves, by path.

        Raises:
            InputError: a file is not valid Python, or imports a module by a computed name.
        """
        waiting, found = [path for name in modules for path in self._of_module(name)], {}
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            if path.endswith(".py"):
                found[path] = self._module(path).fingerprint
                waiting += () if path in NOT_FOLLOWED else self._loaded_by(path)
            else:
                found[path] = hashlib.sha256((self.root / path).read_bytes()).hexdigest()
        return dict(sorted(found.items()))

    def _module(self, path: str) -> Module:
        if path not in self._modules:
            self._modules[path] = Module(path, (self.root / path).read_bytes())
        return self._modules[path]

    def _loaded_by(self, path: str) -> Iterator[str]:
        module, folder = self._module(path), PurePosixPath(path).parent
        for name in module.imports | module.strings:
            yield from self._of_module(name)
        for text in module.strings:
            yield from self.files & {text, f"{folder}/{text}"}

    def _of_module(self, name: str) -> Iterator[str]:
        """Yield the files of a module and of its parent packages; none for modules of other packages."""
        parts = name.split(".")
        if parts[0] == PACKAGE:
            packages = ("/".join((*parts[:end], "__init__.py")) for end in range(1, len(parts) + 1))
            yield from self.files & {*packages, "/".join(parts) + ".py"}


class Module:
    """One parsed file.

    Args:
        path: relative to the folder that contains the package.
        source: its bytes.

    Raises:
        InputError: not valid Python.
    """

    def __init__(self, path: str, source: bytes) -> None:
        self.path = path
        try:
            self.tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            raise InputError(f"{path}, line {line}: no valid Python: {getattr(error, 'msg', error)}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the syntax tree."""
        return hashlib.sha256(_canonical(self.tree).encode()).hexdigest()

    @cached_property
    def imports(self) -> frozenset[str]:
        """Dotted names of all imports; `from a import b` gives `a` and `a.b`.

        Raises:
            InputError: a module is imported by a computed name.
        """
        return frozenset(name for node in self._nodes for name in self._imported_by(node))

    @cached_property
    def strings(self) -> frozenset[str]:
        """All string literals; the name of a module or file counts as an import."""
        constants = (node.value for node in self._nodes if isinstance(node, ast.Constant))
        return frozenset(value for value in constants if isinstance(value, str))

    @cached_property
    def _nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    def _imported_by(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = PurePosixPath(self.path).parent.parts
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and _name(node.func) in BY_NAME and not _is_literal(node.args):
            raise InputError(
                f"{self.path}, line {node.lineno}: {_name(node.func)} takes a name that is computed at run time, "
                "so changes of that module would go unnoticed; write the whole name as a literal"
            )


def write_lists(root: Path, stages: Mapping[str, tuple[str, ...]] = STAGES) -> None:
    """Write `reports/code/STAGE.txt` of every stage.

    Raises:
        InputError: as in `Code.fingerprints`.
    """
    code = Code(root)
    lists = {stage: code.fingerprints([COMMAND_LINE, *_modules(names)]) for stage, names in stages.items()}
    for stage, found in lists.items():
        text = "".join(f"{path} {fingerprint}\n" for path, fingerprint in found.items())
        write_bytes(root / list_of(stage), text.encode())


def list_of(stage: str) -> str:
    """Return the path of the code list of a stage of `dvc.yaml`, such as `evaluate@small`."""
    return str(RELATIVE.code_lists / f"{stage.partition('@')[0]}.txt")


def read_list(text: str) -> dict[str, str]:
    """Parse the fingerprints of a code list, by path."""
    return dict(line.rsplit(" ", 1) for line in text.splitlines())


def _modules(names: Iterable[str]) -> list[str]:
    return [name.partition(":")[0] for name in names]


def _is_literal(arguments: list[ast.expr]) -> bool:
    """Return whether a call's first argument is the literal absolute name of a module."""
    value = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else None
    return isinstance(value, str) and not value.startswith(".")


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _canonical(value: Any) -> str:
    """Return a syntax tree as text without positions, docstrings and empty fields, to which Python versions add."""
    if isinstance(value, ast.Constant):
        return f"{type(value.value).__name__} {value.value!a}"
    if isinstance(value, ast.AST):
        fields = ((name, field) for name, field in ast.iter_fields(value) if name not in ("kind", "type_comment"))
        said = [f"{name}={_canonical(field)}" for name, field in fields if field is not None and field != []]
        return f"{type(value).__name__}({', '.join(said)})"
    if isinstance(value, list):
        return f"[{', '.join(_canonical(item) for item in value if not _is_docstring(item))}]"
    return ascii(value)


def _is_docstring(statement: Any) -> bool:
    """Return whether a statement is an unused string."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


if __name__ == "__main__":
    try:
        write_lists(Path.cwd())
    except InputError as error:
        sys.exit(f"error: {error}")
