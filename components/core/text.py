"""Make untrusted names safe to print."""

from __future__ import annotations

from collections.abc import Sequence

MAX_CHARACTERS = 200


def one_line(text: str, limit: int = MAX_CHARACTERS) -> str:
    r"""Return `text` with unprintable characters escaped (a line break as `\n`); the middle of a long one is cut."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and the number of the others."""
    shown = ", ".join(one_line(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
