"""Real git and DVC repositories for tests of the ledger and of runs: a diamond of stages, and this project itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]
DVC = str(Path(sys.executable).with_name("dvc"))
IDENTITY = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
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
    """Make `folder/main`, committed and with its remote in `folder/remote`: a copy of what DVC's commands made once."""
    made = Path(_made_once().name)
    shutil.copytree(made, folder, symlinks=True, dirs_exist_ok=True)
    root = folder / "main"
    config = root / ".dvc/config"
    config.write_text(config.read_text().replace(os.fspath(made), os.fspath(folder)))
    git_lines(root, "commit", "-q", "--amend", "--no-edit", "--all")
    return root


@cache
def _made_once() -> tempfile.TemporaryDirectory[str]:
    """The repository that `make_repository` copies, which lives as long as this process."""
    made = tempfile.TemporaryDirectory(prefix="pedigree-test-repository-")
    folder = Path(made.name)
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
    return made


def copy_of_project(root: Path) -> Path:
    """Make `root` a repository of one commit: this project as it is now, without tests, data and ignored files."""
    listed = git_lines(PROJECT, "ls-files", "--cached", "--others", "--exclude-standard", "--", ":!tests", ":!data")
    for name in listed:
        if (PROJECT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, root / name)
    git_lines(root, "init", "-q", "-b", "main")
    git_lines(root, "add", "-A")
    git_lines(root, *IDENTITY, "commit", "-q", "-m", "start")
    return root


def git_lines(root: Path, *arguments: str) -> list[str]:
    """The lines that a git command prints."""
    command = ["git", "-C", os.fspath(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def pedigree_command(*arguments: str) -> list[str]:
    """The command line of `pedigree`, with the code of the folder that it runs in, where that has any."""
    return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]


def pedigree(
    root: Path, *arguments: str, env: dict[str, str] | None = None, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `pedigree` in `root` to its end; `env` is added to this process's environment."""
    return subprocess.run(
        pedigree_command(*arguments), cwd=root, env={**os.environ, **(env or {})}, capture_output=True, text=True,
        check=False, timeout=seconds,
    )  # fmt: skip
