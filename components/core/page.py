"""Self-contained HTML reports in one style; equal facts give equal bytes.

A report is a template beside its module that extends `page` and imports from `macros`. All facts are escaped.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

ROOT = Path(__file__).parents[2]  # of template names; `lineage.code` finds dependencies by the full path
PAGE, MACROS = "components/core/page.html", "components/core/macros.html"


@dataclass(frozen=True)
class Cell:
    """A table cell with a note or a mark.

    Attributes:
        text: the value.
        note: small print below the value.
        mark: style: best, good or bad; empty for the default.
    """

    text: str
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """An encoded picture with its alternative text."""

    data: bytes
    alt: str
    kind: str = "png"

    @property
    def uri(self) -> str:
        """Data URI for the attribute `src`."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def render(template: str, **facts: Any) -> bytes:
    """Render a report.

    Args:
        template: path of the template in the repository, such as `components/curation/report.html`.
        facts: variables of the template; a missing one is an error.
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
