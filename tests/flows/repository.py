"""A small real git and DVC repository with a diamond of stages, for tests of the ledger and of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DVC = str(Path(sys.executable).with_name("dvc"))
STAGES = """
stages:
  first:
    cmd: mkdir -p first && cat data/pool/photos/*/image > first/x
    deps: [data/pool]
    params: [seed]
    outs: [first]
  left:
    foreach: ${left.items}
    do:
      cmd: sh -c 'mkdir -p left && (cat first/x params.yaml; echo ${item}) > left/${item}'
      deps: [first]
      params: [left]
      outs: ["left/${item}"]
  last:
    cmd: sh -c 'cat left/a left/b > last.txt'
    deps: [left/a, left/b]
    outs: [last.txt]
"""


def write_params(root: Path, left: int) -> None:
    (root / "params.yaml").write_text(f"seed: 0\nleft:\n  items: [a, b]\n  value: {left}\n")


def make_repository(folder: Path) -> Path:
    """Make `folder/main`, committed and with its remote in `folder/remote`."""
    root = folder / "main"
    image = root / "data/pool/photos/ab12/image"
    image.parent.mkdir(parents=True)
    image.write_text("bytes")
    (root / "dvc.yaml").write_text(STAGES)
    write_params(root, left=1)
    (root / ".gitignore").write_text("/.pedigree\n/first/\n/left/\n/last.txt\n/data/pool/*/?*\n!/data/pool/*/*.dvc\n")
    commands = (
        ["git", "init", "-q", "-b", "main"], [DVC, "init", "-q"],
        [DVC, "remote", "add", "-q", "-d", "storage", str(folder / "remote")],
        [DVC, "add", "-q", "data/pool/photos/ab12"], [DVC, "push", "-q"],
        ["git", "config", "user.name", "Test"], ["git", "config", "user.email", "test@localhost"],
        ["git", "add", "-A"], ["git", "commit", "-q", "-m", "start"],
    )  # fmt: skip
    for command in commands:
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root
