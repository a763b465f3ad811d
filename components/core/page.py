"""HTML reports: one look for all, each page complete in itself, equal bytes for equal facts.

A report is a template beside its owner that extends `page` and imports what it needs from `macros`. Every fact is
escaped.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

ROOT = Path(__file__).parents[2]  # of the templates' names; a whole name says to `lineage.code` who depends on the file
PAGE, MACROS = "components/core/page.html", "components/core/macros.html"


@dataclass(frozen=True)
class Cell:
    """A cell of a table with more than a value.

    Attributes:
        text: shown as it is.
        note: small, below it.
        mark: how it is set: best, good, bad; as usual if not given.
    """

    text: str
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """An encoded picture and what stands for it where it is not seen."""

    data: bytes
    alt: str
    kind: str = "png"

    @property
    def uri(self) -> str:
        """The bytes themselves, for the attribute `src`."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def render(template: str, **facts: Any) -> bytes:
    """Render a report.

    Args:
        template: path of the template in the repository, such as `components/curation/report.html`.
        facts: what the template names; a fact that is not given is an error.
    """
    return _environment().get_template(template).render(facts).encode()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ROOT), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(page=PAGE, macros=MACROS)  # pyright: ignore[reportUnknownMemberType]
    return environment
