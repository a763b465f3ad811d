"""What the charts of all reports share: colors, and figures as PNG whose equal content gives equal bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GRAY, RED = "#2f6fab", "#c3ccd5", "#c8452e"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: in inches; 10 fill a page.
        height: in inches.
    """
    from matplotlib.figure import Figure  # imported here, because not every stage that imports this draws

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """Encode a figure."""
    buffer = io.BytesIO()
    figure.savefig(  # pyright: ignore[reportUnknownMemberType]
        buffer, format="png", dpi=130, metadata={"Software": None}
    )
    return buffer.getvalue()
