"""Our training against lightly-train's `dinov2` method on the same images, each as a whole: data, step, log.

    python -m venv VENV
    VENV/bin/pip install torch==2.14.1 torchvision==0.29.1 "lightly-train==0.18.*"
    python -m tests.benchmarks.lightly_train VENV/bin/python [STEPS]

By hand, since it needs that environment. lightly-train is AGPL: it is run by its public `pretrain`, telemetry off, with
random weights, so that nothing is downloaded. Both train ViT-S/14 (no registers, drop path 0.1) on 2 x 224 + 8 x 98
pixels with 65,536 prototypes, softmax centering, batch 8, bfloat16, 2 threads and one data worker. Ours always has two
heads; theirs too where it is not said otherwise (its default is one that class tokens and patches share).

Seconds of a step are the median of what each side's own log says of its steps but the first two, waiting for data
included. Memory is the peak (VmHWM) of the training process until STEPS steps are logged, of one more: data workers and
what is saved at the end count for neither side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.table import Table

BATCH, THREADS, NUM_IMAGES, PIXELS = 8, 2, 96, 320

OURS = """
import json, sys
from pathlib import Path
import components.__main__  # its settings
import torch
from components.training.checkpoint import Checkpoints
from tests.training.jobs import make_job, train_job
torch.set_num_threads(int(sys.argv[3]))
folder = Path(sys.argv[1])
train_job(make_job(json.loads(sys.argv[2]), folder / "curated"), Checkpoints(folder / "out"))
"""

THEIRS = """
import json, sys
import lightly_train, torch
torch.set_num_threads(int(sys.argv[3]))
if __name__ == "__main__":
    lightly_train.pretrain(
        out=sys.argv[1] + "/out", data=sys.argv[1] + "/images", model="dinov2/vits14-notpretrained", method="dinov2",
        accelerator="cpu", devices=1, epochs=1000, num_workers=1, precision="bf16-mixed",
        loggers={"tensorboard": None}, **json.loads(sys.argv[2]),
    )
"""


@dataclass(frozen=True)
class Cost:
    """What a step of a side costs."""

    seconds: float
    peak_mib: float


def ours(checkpointing: str, steps: int) -> dict[str, Any]:
    """Our configuration."""
    return {
        "steps": steps,
        "batch_size": BATCH,
        "precision": "bfloat16",
        "activation_checkpointing": checkpointing,
        "log_every_steps": 1,
        "stream": {"num_workers": 1},
        "backbone": {"dim": 384, "depth": 12, "num_heads": 6, "ffn": "mlp", "num_registers": 0, "drop_path": 0.1},
        "dino_head": {"num_prototypes": 65_536, "bottleneck_dim": 256},
        "ibot_head": {"num_prototypes": 65_536},
        "objective": {"centering": "softmax"},
        "optimizer": {"warmup_steps": 0, "freeze_last_layer_steps": 0},
        "teacher": {"temp_warmup_steps": 0},
    }


def theirs(steps: int, *, separate: bool = True, checkpointing: bool = False) -> dict[str, Any]:
    """lightly-train's arguments."""
    return {
        "batch_size": BATCH,
        "method_args": {"output_dim": 65_536, "ibot_separate_head": separate},
        "activation_checkpoint_args": {"enabled": checkpointing},
        "trainer_args": {"max_steps": steps, "log_every_n_steps": 1},
    }


def write_images(folder: Path) -> None:
    """The same JPEGs as files (`images`) and as a curated set (`curated`)."""
    from components.data.manifest import CURATED_SCHEMA, MANIFEST, write_manifest
    from components.data.shards import ShardWriter

    known = {
        "format": "JPEG", "width": PIXELS, "height": PIXELS, "source": "skimage", "source_uri": "skimage",
        "license": "public domain", "origin": "balanced", "group_id": "",
    }  # fmt: skip
    (folder / "images").mkdir()
    (folder / "curated").mkdir()
    rows = []
    with ShardWriter(folder / "curated", 2**30) as writer:
        for image_id, encoded in sorted((hashlib.sha256(file).hexdigest(), file) for file in _photographs()):
            (folder / "images" / f"{image_id}.jpg").write_bytes(encoded)
            shard, offset, length = writer.add(image_id, "jpg", encoded)
            place = {"image_id": image_id, "shard": shard, "offset": offset, "length": length}
            rows.append({**dict.fromkeys(CURATED_SCHEMA.names), **known, **place})
    write_manifest(pa.Table.from_pylist(rows, CURATED_SCHEMA), folder / "curated" / MANIFEST)


def _photographs() -> list[bytes]:
    """Parts of photographs as JPEGs."""
    from skimage import data

    photos = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    files = []
    for number in range(NUM_IMAGES):
        photo, turn = photos[number % len(photos)], number // len(photos)
        left, top = turn * 11 % (photo.width - 250), turn * 7 % (photo.height - 250)
        file = io.BytesIO()
        photo.crop((left, top, left + 250, top + 250)).resize((PIXELS, PIXELS)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def measure(python: str, program: str, folder: Path, values: dict[str, Any], steps: int) -> Cost:
    """Run a side until so many steps are logged; `values` has it take one more, so that no checkpoint is counted."""
    out = folder / "out"
    settings = {"OMP_NUM_THREADS": str(THREADS), "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "PYTHONPATH": os.getcwd()}
    script = folder / "side.py"
    script.write_text(program)
    peak, seconds = 0.0, list[float]()
    with (folder / "said.txt").open("w") as said:
        command = [python, str(script), str(folder), json.dumps(values), str(THREADS)]
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=said, stderr=subprocess.STDOUT)
        try:
            while len(seconds) < steps and process.poll() is None:
                peak = max(peak, _peak_mib(process.pid))
                seconds = _logged(out)
                time.sleep(0.1)
            seconds = _logged(out)  # what was written between the last look and the end
        finally:
            process.terminate()
            process.wait()
    if len(seconds) < steps:
        raise RuntimeError(
            f"{len(seconds)} of {steps} steps logged; it said:\n{(folder / 'said.txt').read_text()[-3000:]}"
        )
    return Cost(statistics.median(seconds[2:]), peak)


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _logged(out: Path) -> list[float]:
    """Seconds of each step so far, by the side's own log."""
    table, lines = out / "loss.csv", out / "metrics.jsonl"
    if table.exists():
        with table.open() as file:
            return [BATCH / float(row["images_per_second"]) for row in csv.DictReader(file) if row["peak_memory_gib"]]
    if not lines.exists():
        return []
    steps = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    timed = [step for step in steps if "profiling/batch_time" in step]
    return [step["profiling/batch_time"] + step.get("profiling/data_time", 0.0) for step in timed]


def main(python: str, steps: int = 10) -> None:
    """Print what each side costs, and how much less ours does."""
    mine = {f"ours, checkpointing {mode}": ours(mode, steps + 1) for mode in ("none", "selective", "full")}
    other = {
        "lightly-train": theirs(steps + 1),
        "lightly-train, activations made again": theirs(steps + 1, checkpointing=True),
        "lightly-train, one shared head": theirs(steps + 1, separate=False),
    }
    costs: dict[str, Cost] = {}
    for name, values in (mine | other).items():
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder))
            side = (sys.executable, OURS) if name in mine else (python, THEIRS)
            costs[name] = measure(*side, Path(folder), values, steps)
    table = Table("training", "s/step", "images/s", "peak MiB", *(f"against {name}" for name in mine), box=None)
    for name, cost in costs.items():
        figures = f"{cost.seconds:.2f}", f"{BATCH / cost.seconds:.2f}", f"{cost.peak_mib:.0f}"
        ratios = [f"{cost.seconds / costs[m].seconds:.2f}x, 1 / {cost.peak_mib / costs[m].peak_mib:.2f}" for m in mine]
        table.add_row(name, *figures, *(ratios if name in other else ["", ""]))
    Console(width=190).print(table)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
