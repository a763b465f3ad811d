"""`pedigree env`: print the local stack's variables for a shell."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from flows.commands.decorators import command
from infra.local import supervisor


@command()
def env() -> None:
    """Print `export` lines, secrets included: eval "$(pedigree env)"."""
    variables = supervisor.environment(Path.cwd())
    sys.stdout.write("".join(f"export {name}={_quoted(value)}\n" for name, value in variables.items()))


def _quoted(value: str) -> str:
    """Return any value in single quotes, escaped for a shell."""
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"
