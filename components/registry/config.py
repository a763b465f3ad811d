"""Parameters of the register stage."""

from __future__ import annotations

from pydantic import Field

from components.core.config import Config


class RegisterConfig(Config):
    """How a registered model takes images when its caller does not say."""

    resolution: int = Field(518, ge=1, le=16384)  # pixels a side; DINOv2 sec. 5 ends training at 518 (patch 14)
