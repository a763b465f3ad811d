"""`python -m tests.benchmarks.kills [TIMES]`: SIGKILL at random moments of a training, each time started again.

The weights at the end must be those of a training that nobody disturbed, bit for bit. A checkpoint is written every
third step while the training goes on, so that many of the kills come in the middle of a write.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from components.core.storage import sha256_file
from components.recipe import load_recipe
from tests.training.jobs import write_curated

TRAIN = """
import json, sys
from pathlib import Path
import torch
from components.pretraining.config import PretrainConfig
from components.pretraining.stage import run
torch.set_num_threads(1)
run(PretrainConfig.model_validate(json.loads(sys.argv[1])), Path(), seed=0)
"""


def start(folder: Path, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start (or go on with) the training in `folder`."""
    curated = folder / "data" / "curated"
    if not curated.exists():
        write_curated(curated)
    env = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, json.dumps(values)]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL)


def checkpoints(folder: Path) -> list[int]:
    """Steps behind each of the run's checkpoints."""
    return sorted(int(path.name[5:]) for path in folder.glob(".pedigree/checkpoints/*/step_*"))


def undisturbed(folder: Path, values: dict[str, Any]) -> tuple[str, float, float]:
    """SHA-256 of the weights, seconds to the first checkpoint, and seconds in all."""
    begun = time.monotonic()
    process = start(folder, values)
    while not checkpoints(folder) and process.poll() is None:
        time.sleep(0.01)
    first = time.monotonic() - begun
    assert process.wait() == 0
    return digest(folder), first, time.monotonic() - begun


def digest(folder: Path) -> str:
    """SHA-256 of both weights files."""
    return " ".join(sha256_file(folder / "models" / "pretrained" / f"{n}.safetensors") for n in ("model", "heads"))


def main(times: int) -> None:
    """Kill so often, then let it end, and compare."""
    recipe = load_recipe(Path(), "tiny-cpu").pretrain.model_dump(mode="json")
    values = recipe | {"steps": 10 * times, "batch_size": 8, "checkpoint_every_steps": 3}
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        expected, first, whole = undisturbed(calm, values)
        alive, halves = [], 0
        for number in range(times):
            process, newest = start(killed, values), checkpoints(killed)
            if number % 4:  # during its steps, of which each checkpoint has three
                while checkpoints(killed) == newest and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(generator.uniform(0, 6 * (whole - first) / values["steps"]))
            else:  # while it starts
                time.sleep(generator.uniform(0, first))
            process.kill()
            process.wait()
            alive.append(max(checkpoints(killed), default=0))
            halves += bool(list(killed.glob(".pedigree/checkpoints/*/.step_*")))
        assert start(killed, values).wait() == 0
        same = digest(killed) == expected
    sys.stdout.write(
        f"{times} kills, {halves} of them while a checkpoint was written; steps behind the newest checkpoint: {alive}\n"
        f"weights after {values['steps']} steps are {'the same bits' if same else 'OTHERS'}\n"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
