"""A key pair to sign and verify models with, as the local stack makes it."""

from __future__ import annotations

from pathlib import Path

from components.core.signing import PRIVATE_KEY, PUBLIC_KEY
from infra.local.site import make_signing_key


def key_variables(folder: Path) -> dict[str, str]:
    """Make a key pair in a folder, and return the variables that name it."""
    private, public = folder / "key.pem", folder / "key.pub.pem"
    make_signing_key(private, public)
    return {PRIVATE_KEY: str(private), PUBLIC_KEY: str(public)}
