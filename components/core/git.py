"""Ask git about a repository, without changing it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def try_git(root: Path, *arguments: str) -> str | None:
    """Return what a git command prints; None where git refuses, as it does outside of a repository."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
