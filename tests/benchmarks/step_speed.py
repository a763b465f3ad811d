"""Our training step against a plainly written one, and without each of its techniques in turn.

    python -m tests.benchmarks.step_speed [BATCH_SIZE [PROTOTYPES [TURNS]]]

prints the ablation. Each side is a process of its own (`step_side`); they take turns, one step each, so that a busy
machine slows all of them, and the first step of each does not count.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from tests.benchmarks.step_side import Side
from tests.benchmarks.step_without import TECHNIQUES


@dataclass(frozen=True)
class Cost:
    """What a side's steps cost; memory is the peak of the process, and how much of it came after the imports."""

    seconds: float
    peak_mib: float
    own_mib: float


def measure(sides: dict[str, Side], turns: int = 3) -> dict[str, Cost]:
    """Let the sides take turns; medians of `turns` steps."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(_started(side)) for name, side in sides.items()}
        for turn in range(turns + 1):
            for name, process in started.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                answers[name] = json.loads(process.stdout.readline())
                if turn:
                    seconds[name].append(answers[name]["seconds"])
    return {
        name: Cost(statistics.median(seconds[name]), a["peak_mib"], a["peak_mib"] - a["imported_mib"])
        for name, a in answers.items()
    }


def ablate(base: Side, turns: int) -> Table:
    """One row for ours, for ours without each technique, with activations made again, and for the plain step."""
    table = Table("step", "images/s", "of ours", "peak MiB", "of ours", "less imports", box=None)
    others = {f"without {name}": replace(base, without=name) for name in TECHNIQUES}
    others |= {"in float32": replace(base, precision="float32"), "plain": replace(base, side="plain")}
    others |= {f"checkpointing {m}": replace(base, activation_checkpointing=m) for m in ("none", "full")}
    for name, side in others.items():  # two at a time: memory for all of them at once is not everywhere
        pair = measure({"ours": base, name: side}, turns)
        ours = pair["ours"]
        for row, cost in pair.items() if not table.row_count else [(name, pair[name])]:
            rate, memory = f"{base.batch_size / cost.seconds:.2f}", f"{cost.peak_mib:.0f}"
            relative = f"{ours.seconds / cost.seconds:.2f}", f"{cost.peak_mib / ours.peak_mib:.2f}"
            table.add_row(row, rate, relative[0], memory, relative[1], f"{cost.own_mib:.0f}")
    return table


@contextlib.contextmanager
def _started(side: Side) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.benchmarks.step_side", side.line()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main(batch_size: int = 8, prototypes: int = 65_536, turns: int = 3) -> None:
    """Print the ablation."""
    Console(width=120).print(ablate(Side("ours", batch_size=batch_size, prototypes=prototypes), turns))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
