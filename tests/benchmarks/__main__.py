"""`make bench`, or `python -m tests.benchmarks [--json] [NAME ...]`: ratios, both sides measured in one run.

Sides take turns, so that a busy machine slows both; each figure is the median of the turns. A ratio above 1 means that
what we do is faster. `curation` is a table of its own: seconds and memory of each step as the pool grows; 1e6 vectors
need half an hour and 1.5 GB on the disk for temporary files, 1e7 ten times the disk and many hours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from tests.benchmarks import curation


@dataclass(frozen=True)
class Row:
    """One comparison; figures are rates, so that more is better."""

    name: str
    what: str
    ours: float
    other: float
    unit: str

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.ours / self.other


def crops() -> Row:
    """2 x 224 + 8 x 98 pixel crops of 320-pixel JPEGs, all augmentations, against torchvision's way on PIL images."""
    return _crops("crops", 320)


def crops_large() -> Row:
    """The same on 1024-pixel JPEGs."""
    return _crops("crops_large", 1024)


def _crops(name: str, pixels: int) -> Row:
    import torch

    from components.data.config import CropConfig
    from components.data.crops import sample_crops
    from tests.benchmarks.crops_pillow import sample_crops_plainly

    config, files = CropConfig(), _photographs(pixels)

    def ours() -> list[NDArray[np.uint8]]:
        made = [sample_crops(file, config, 0, number) for number, file in enumerate(files)]
        return [crop for item in made for crop in (*item.global_crops, *item.local_crops)]

    def plain() -> list[NDArray[np.uint8]]:
        return [crop for number, file in enumerate(files) for crop in sample_crops_plainly(file, config, 0, number)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of the loader
    try:
        difference = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(ours(), plain(), strict=True)])
        assert difference < 3, f"the two sides crop differently: {difference:.2f} of 255 levels apart"
        seconds = _take_turns(ours, plain, turns=7)
    finally:
        torch.set_num_threads(threads)
    what = f"10 crops of {pixels}-pixel JPEGs, 1 thread, against torchvision's way"
    return Row(name, what, *_rates(len(files), seconds), "images/s")


def shards() -> Row:
    """Read 4,000 images of 20 kB in random order, by offset from one shard or as files; the page cache is warm."""
    from components.data.shards import ShardReader, ShardWriter

    generator, count = np.random.default_rng(0), 4000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ShardWriter(folder / "shards", 2**30) as writer:
            places = []
            for number in range(count):
                data = generator.bytes(20_000)
                places.append(writer.add(f"{number:064x}", "jpg", data))
                (folder / f"{number:064x}.jpg").write_bytes(data)
        order = generator.permutation(count).tolist()
        reader = ShardReader(folder / "shards")

        def ours() -> int:
            return sum(len(reader.read(*places[number])) for number in order)

        def files() -> int:
            return sum(len((folder / f"{number:064x}.jpg").read_bytes()) for number in order)

        assert ours() == files() == 20_000 * count
        seconds = _take_turns(ours, files, turns=9)
    return Row("shards", "by offset from a shard, against one file each", *_rates(count, seconds), "images/s")


def attention() -> Row:
    """Training steps of the tiny recipe's shape in bfloat16: matrix products against torch's default attention.

    One thread: with as many threads as cores and other work beside it, waiting threads decide the outcome (LOG.md).
    """
    import torch

    from components.data.batch import Batch
    from components.data.config import MaskingConfig
    from components.data.masking import sample_masks
    from components.model import layers
    from components.model.attention import attend, fused_attention
    from components.model.config import HeadConfig, ViTConfig
    from components.model.head import ProjectionHead
    from components.model.vit import VisionTransformer
    from components.training.config import TrainingConfig
    from components.training.networks import Network, self_distillation
    from components.training.schedules import StepValues
    from components.training.step import TrainingStep

    size, batch = 32, 64
    shape = ViTConfig(patch_size=8, dim=128, depth=4, num_heads=2, num_registers=2, image_size=48)
    head = HeadConfig(num_prototypes=256, hidden_dim=256, bottleneck_dim=64)

    def prepare(attend: Callable[..., Any]) -> Callable[[], Any]:
        torch.manual_seed(0)
        heads = {name: ProjectionHead(shape.dim, head) for name in ("dino", "ibot")}
        networks = self_distillation(Network(VisionTransformer(shape), heads))
        step = TrainingStep(networks, TrainingConfig(batch_size=size, precision="bfloat16"), 0, torch.device("cpu"))
        masks = torch.from_numpy(sample_masks(batch, (6, 6), MaskingConfig(), np.random.default_rng(0)))
        images = Batch(torch.randn(batch, 3, 48, 48), torch.randn(6 * size, 3, 24, 24), masks, [])

        def run() -> None:
            with mock.patch.object(layers, "attend", attend):
                step(images, 0, StepValues(1e-4, 1e-4, 0.04, 0.99, 0.04))

        return run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _take_turns(prepare(attend), prepare(fused_attention), turns=15)
    finally:
        torch.set_num_threads(threads)
    what = "training step, 1 thread, bfloat16, against torch's default SDPA"
    return Row("attention", what, *_rates(size, seconds), "images/s")


def students() -> Row:
    """Steps of two students of the tiny recipe, at whose images the teacher looks once, against a look for each."""
    import torch

    from components.data.batch import Batch
    from components.distillation.together import SharedTeacher
    from components.model.head import ProjectionHead
    from components.model.vit import VisionTransformer
    from components.recipe import load_recipe
    from components.training.networks import Network, distillation
    from components.training.schedules import StepValues
    from components.training.step import TrainingStep

    recipe = load_recipe(Path(), "tiny-cpu", ["distill.precision=bfloat16"])
    config, shape = recipe.distill, recipe.distill.students["small"].backbone

    def network(shape: Any) -> Network:
        heads = {"dino": recipe.pretrain.dino_head, "ibot": recipe.pretrain.ibot_head}
        backbone = VisionTransformer(shape.trained_at(config.crops.global_size))
        return Network(backbone, {n: ProjectionHead(shape.dim, head) for n, head in heads.items()})

    teacher, size, crops = network(recipe.pretrain.backbone), config.batch_size, config.crops
    both = [TrainingStep(distillation(network(shape), teacher), config, 0, torch.device("cpu")) for _ in range(2)]
    sides = [(2, crops.global_size), (crops.num_local, crops.local_size)]
    images = Batch(*(torch.randn(count * size, 3, side, side) for count, side in sides), None, [])
    values = StepValues(1e-4, 1e-4, 0.04, 0.99, 0.04)
    shared = SharedTeacher(teacher.backbone)

    def together() -> None:
        for number, training in enumerate(both):
            shared.select(first=number == 0, last=number == 1)
            training(images, 0, values)
        shared.select(first=True, last=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _take_turns(together, lambda: [training(images, 0, values) for training in both], turns=15)
    finally:
        torch.set_num_threads(threads)
    what = "step of two students, tiny recipe, 1 thread, teacher shared against not"
    return Row("students", what, *_rates(size, seconds), "images/s")


def step() -> Row:
    """ViT-S/14 with drop path 0.3, 2 x 224 + 8 x 98 pixels, 65,536 prototypes, batch 8, against a plain step."""
    what = "training step, ViT-S/14, against one written plainly"
    ours, plain = _steps()
    return Row("step", what, _STEP_IMAGES / ours.seconds, _STEP_IMAGES / plain.seconds, "images/s")


def step_memory() -> Row:
    """Peak memory of these steps' processes."""
    ours, plain = _steps()
    return Row("step_memory", "its peak memory, imports included", 1024 / ours.peak_mib, 1024 / plain.peak_mib, "1/GiB")


_STEP_IMAGES = 8


@functools.cache
def _steps() -> list[Any]:
    from tests.benchmarks.step_side import Side
    from tests.benchmarks.step_speed import measure

    return list(measure({side: Side(side, batch_size=_STEP_IMAGES) for side in ("ours", "plain")}).values())


def checkpoint() -> Row:
    """All state of a ViT-S/14 in training: MiB a second that training stands still, against waiting for the disk."""
    import torch

    from components.model.config import HeadConfig, ViTConfig
    from components.model.head import ProjectionHead
    from components.model.vit import VisionTransformer
    from components.training.checkpoint import Checkpoints, Progress
    from components.training.config import TrainingConfig
    from components.training.networks import Network, self_distillation
    from components.training.step import TrainingStep

    shape, head = ViTConfig(dim=384, depth=12, num_heads=6, image_size=224), HeadConfig(num_prototypes=16_384)
    heads = {name: ProjectionHead(shape.dim, head) for name in ("dino", "ibot")}
    networks = self_distillation(Network(VisionTransformer(shape), heads))
    training = TrainingStep(networks, TrainingConfig(precision="bfloat16"), 0, torch.device("cpu"))
    still, whole = [], []
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Checkpoints(Path(name))
        for turn in range(6):
            begun = time.perf_counter()
            checkpoints.save(training, Progress(turn))
            still.append(time.perf_counter() - begun)
            checkpoints.wait()
            whole.append(time.perf_counter() - begun)
        mib = sum(file.stat().st_size for file in Path(name, "step_5").iterdir()) / 2**20
    rates = (mib / statistics.median(seconds[1:]) for seconds in (still, whole))
    return Row("checkpoint", f"{mib:,.0f} MiB of state, copied, against written and checked", *rates, "MiB/s")


def knn() -> Row:
    """Pairs above 0.6 among the 64 nearest of 8,000 vectors of 256 numbers: FAISS against NumPy."""
    from components.curation.neighbors import CHUNK, cosine, find_neighbors

    generator, k, threshold = np.random.default_rng(0), 64, 0.6
    vectors = generator.standard_normal((8000, 256)).astype(np.float32)
    vectors[7000:] = vectors[:1000] + 0.5 * vectors[7000:]  # near-duplicates: cosine about 0.9
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def ours() -> set[tuple[int, int]]:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress
            found = find_neighbors(vectors, None, k, threshold)
        return set(zip(found.query.tolist(), found.neighbor.tolist(), strict=True))

    def brute() -> set[tuple[int, int]]:
        pairs: set[tuple[int, int]] = set()
        for start in range(0, len(vectors), CHUNK):
            scores = vectors[start : start + CHUNK] @ vectors.T
            near = np.argpartition(scores, -k - 1, axis=1)[:, -k - 1 :]
            rows = np.repeat(np.arange(start, start + len(scores)), k + 1)
            others = near.ravel()
            kept = (rows != others) & (cosine(vectors, rows, vectors, others) > threshold)
            pairs.update(zip(rows[kept].tolist(), others[kept].tolist(), strict=True))
        return pairs

    found = ours()
    assert found == brute(), "the two sides find other pairs"
    assert len(found) >= 2000
    seconds = _take_turns(ours, brute, turns=3)
    return Row("knn", "near-duplicates by FAISS, against NumPy", *_rates(len(vectors), seconds), "vectors/s")


def probe_grid() -> Row:
    """Linear probes of 2,000 images of 384 numbers: 52 heads at once, against one head of each input by torch.

    52 divided by the ratio is what the grid costs in units of one head.
    """
    import torch

    from tests.benchmarks.probe_grid import HEADS, sides

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grid, single = sides()
        seconds = _take_turns(grid, single, turns=5)
    finally:
        torch.set_num_threads(threads)
    what = "linear probe, 52 heads at once, 1 thread, against one by one"
    return Row("probe_grid", what, HEADS[0] / seconds[0], HEADS[1] / seconds[1], "heads/s")


def features() -> Row:
    """Features of 8,000 images at 98 pixels by a small ViT/14: the evaluation's pass, against a plain loop."""
    import torch
    from skimage import data

    from tests.benchmarks.features import IMAGES, sides

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            names = ("astronaut", "coffee", "chelsea", "hubble_deep_field")
            photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
            seconds, found = [], []
            for side in sides(Path(folder), photographs):
                begun = time.perf_counter()
                found.append(side())
                seconds.append(time.perf_counter() - begun)
            np.testing.assert_allclose(*found, atol=1e-4, err_msg="the two sides give other features")
    finally:
        torch.set_num_threads(threads)
    what = "features of 8,000 images at 98 pixels, 1 thread, against a plain loop"
    return Row("features", what, *_rates(IMAGES, (seconds[0], seconds[1])), "images/s")


def curate_throughput() -> Row:
    """Decode, score and embed 32 photographs of 1024 pixels with a ViT-Ti/16: the stage against a plain loop."""
    return _embedding("curate_throughput", "decode + score + ViT-Ti/16, against plain Pillow + torch", network=True)


def curate_descriptor() -> Row:
    """The same with the built-in descriptor, which costs so little that all else is seen."""
    return _embedding("curate_descriptor", "decode + score + descriptor, against a plain loop", network=False)


def served_single() -> Row:
    """A registered ViT-S/14 at 224 pixels, one 320-pixel JPEG a call, against a plain torch loop."""
    return _served("served_single", 1)


def served_batch() -> Row:
    """The same, 16 of them a call."""
    return _served("served_batch", 16)


def served_size() -> Row:
    """The registered model's folder against its weights file alone."""
    from tests.benchmarks.served import served

    with served(_photographs(320)) as (_, _, folder):
        whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        weights = next(folder.rglob("model.safetensors")).stat().st_size
    return Row("served_size", "registered ViT-S/14, against its weights alone", 2**30 / whole, 2**30 / weights, "1/GiB")


def export_timm() -> Row:
    """A ViT-S/14 exported to timm: features within 1e-4 of ours, forward pass of 8 images at 224 pixels."""
    return _exported("timm")


def export_transformers() -> Row:
    """The same for transformers."""
    return _exported("transformers")


def export_onnx() -> Row:
    """The same for onnxruntime."""
    return _exported("onnx")


def audit_append() -> Row:
    """Two writers append 1,000 audit events each at once: one of the last ten against one of the first ten."""
    from tests.benchmarks.audit import append_at_once

    rates = _rates(1, append_at_once())
    return Row("audit_append", "the last of 2 x 1,000 events, against the first", *rates, "events/s")


def where_used() -> Row:
    """One image over 50 data versions of 50,000 images: the index, once made, against reading all manifests."""
    import pyarrow.parquet as pq

    from components.core.layout import Layout
    from components.lineage.stored import object_path
    from components.lineage.where_used import Query, find
    from tests.benchmarks.lineage import into_cache, repository, without_registry

    versions, rows = 50, 50_000
    with tempfile.TemporaryDirectory() as name, without_registry():
        root = Path(name)
        manifests, image = repository(root, versions, rows, into_cache(root))
        begun = time.perf_counter()
        find(root, Query(frozenset([image])))
        sys.stderr.write(f"where_used: the index was made in {time.perf_counter() - begun:.1f} s\n")

        def ours() -> int:
            return sum(len(use.rows) for use in find(root, Query(frozenset([image]))).data)

        def naive() -> int:
            paths = (Layout(root).dvc_cache / object_path(md5) for md5 in manifests)
            return sum(len(pq.read_table(path, filters=[("image_id", "==", image)])) for path in paths)

        assert ours() == naive() == 1
        seconds = _take_turns(ours, naive, turns=3)
    what = f"an image in {versions} data versions of {rows:,}, against all manifests"
    return Row("where_used", what, *_rates(1, seconds), "searches/s")


def trace_images() -> Row:
    """A snapshot of 1,000,000 images traced to an image and to its sources, against a loop over its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.lineage.image_index import ImageIndex, Query
    from components.lineage.trace_data import count_sources
    from components.lineage.where_used import Search
    from tests.benchmarks.lineage import into_cache, repository, without_registry

    with tempfile.TemporaryDirectory() as name, without_registry():
        root = Path(name)
        (md5,), image = repository(root, 1, 1_000_000, into_cache(root))
        index = ImageIndex(root)
        (data,) = Search(root).data

        def ours() -> tuple[int, dict[str, int]]:
            found = {node.name: node.facts["images"] for node in count_sources(index.objects.read(md5))}
            return len(index.search(data, Query(frozenset([image])))), found

        def loop() -> tuple[int, dict[str, int]]:
            counts: dict[str, int] = {}
            found = 0
            for row in pq.read_table(pa.BufferReader(index.objects.read(md5))).to_pylist():
                counts[row["source"]] = counts.get(row["source"], 0) + 1
                found += row["image_id"] == image
            return found, counts

        assert ours() == loop()
        seconds = _take_turns(ours, loop, turns=1)
    return Row("trace_images", "1,000,000 images to sources and one image, against a loop", *_rates(1, seconds), "1/s")


_MADE = (
    crops,
    crops_large,
    shards,
    attention,
    students,
    step,
    step_memory,
    checkpoint,
    knn,
    probe_grid,
    features,
    curate_throughput,
)
_TRACED = (audit_append, where_used, trace_images)
_USED = (served_single, served_batch, served_size, export_timm, export_transformers, export_onnx)
BENCHMARKS: dict[str, Callable[[], Row]] = {one.__name__: one for one in (*_MADE, curate_descriptor, *_USED, *_TRACED)}
CURATION, SIZES = "curation", "10000,100000"
NAMES = [*BENCHMARKS, CURATION]


def _photographs(pixels: int) -> list[bytes]:
    """Eight square JPEGs, each a mosaic of four real photographs."""
    from skimage import data

    loaded = [
        Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea", "hubble_deep_field")
    ]
    squares = [image.convert("RGB").resize((512, 512)) for image in loaded]
    files = []
    for turn in range(8):
        mosaic = Image.new("RGB", (1024, 1024))
        for place in range(4):
            mosaic.paste(squares[(place + turn) % 4].rotate(90 * (turn // 4)), (512 * (place % 2), 512 * (place // 2)))
        buffer = io.BytesIO()
        mosaic.resize((pixels, pixels), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def _embedding(name: str, what: str, network: bool) -> Row:
    import torch

    from tests.benchmarks.curate_throughput import REPEATS, sides

    threads, files = torch.get_num_threads(), _photographs(1024)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours, plain = sides(Path(folder), files, network)
            np.testing.assert_allclose(ours(), plain(), atol=1e-5, err_msg="the two sides embed differently")
            seconds = _take_turns(ours, plain, turns=5)
    finally:
        torch.set_num_threads(threads)
    return Row(name, what, *_rates(REPEATS * len(files), seconds), "images/s")


def _served(name: str, count: int) -> Row:
    import torch

    from tests.benchmarks.served import served

    threads, files = torch.get_num_threads(), (_photographs(320) * 4)[:count]
    torch.set_num_threads(1)
    try:
        with served(files) as (ours, plain, _):
            np.testing.assert_allclose(ours(files), plain(files), atol=1e-3, err_msg="the two sides embed differently")
            seconds = _take_turns(lambda: ours(files), lambda: plain(files), turns=7 if count == 1 else 2)
    finally:
        torch.set_num_threads(threads)
    return Row(name, f"ViT-S/14, {count} a call, 1 thread, against plain torch", *_rates(count, seconds), "images/s")


def _exported(kind: str) -> Row:
    import torch

    from tests.benchmarks.served import BATCH, GATED, SMALL, exported

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exported(kind, GATED, threads=1):
            pass  # its features are compared
        with exported(kind, SMALL, threads=1) as sides:
            seconds = _take_turns(*sides, turns=5)
    finally:
        torch.set_num_threads(threads)
    what = f"ViT-S/14 forward, 1 thread, against its export in {'onnxruntime' if kind == 'onnx' else kind}"
    return Row(f"export_{kind}", what, *_rates(BATCH, seconds), "images/s")


def _curation(sizes: str, steps: str) -> list[curation.Cost]:
    """What each step costs at each size; told on stderr as it is done, because the large ones take hours."""
    unknown = sorted(set(steps.split(",")) - set(curation.STEPS))
    if unknown:
        raise typer.BadParameter(f"unknown step {unknown[0]!r}; known: {', '.join(curation.STEPS)}")
    if "kmeans" not in steps and ("sample" in steps or "retrieval" in steps):
        raise typer.BadParameter(f"{steps}: sample and retrieval read what kmeans made; put kmeans before them")
    costs = []
    for cost in curation.measure([int(size) for size in sizes.split(",")], steps.split(",")):
        sys.stderr.write(f"{cost}\n")
        costs.append(cost)
    return costs


def _take_turns(ours: Callable[[], Any], other: Callable[[], Any], turns: int) -> tuple[float, float]:
    """Median seconds of each, after one call of each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for call, kept in zip((ours, other), seconds, strict=True):
            begun = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _rates(count: int, seconds: tuple[float, float]) -> tuple[float, float]:
    return count / seconds[0], count / seconds[1]


def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(NAMES)}. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout, for programs.")] = False,
    sizes: Annotated[str, typer.Option(help="curation: numbers of vectors.")] = SIZES,
    steps: Annotated[str, typer.Option(help="curation: its steps.")] = ",".join(curation.STEPS),
) -> None:
    """Measure named comparisons; each needs a few seconds, `curation` some minutes."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"unknown benchmark {unknown[0]!r}; known: {', '.join(NAMES)}")
    chosen = names or NAMES
    rows = [BENCHMARKS[name]() for name in chosen if name in BENCHMARKS]
    costs = _curation(sizes, steps) if CURATION in chosen else []
    if as_json:
        values = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
        values += [{"name": CURATION, **dataclasses.asdict(cost)} for cost in costs]
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
        return
    console = Console()
    if rows:
        table = Table("name", "what", "ours", "other", "unit", "ours / other", box=None)
        for row in rows:
            table.add_row(row.name, row.what, _figure(row.ours), _figure(row.other), row.unit, f"{row.ratio:.2f}")
        console.print(table)
    if costs:
        table = Table("curation", "vectors", "seconds", "CPU seconds", "peak MiB", "", box=None)
        for cost in costs:
            seconds = (f"{cost.seconds:,.1f}", f"{cost.cpu_seconds:,.1f}")
            table.add_row(cost.step, f"{cost.size:,}", *seconds, f"{cost.peak_mib:,.0f}", cost.note)
        console.print(table)
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of turns", highlight=False)


if __name__ == "__main__":
    typer.run(run)
