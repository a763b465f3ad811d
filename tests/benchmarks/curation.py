"""What curation costs as the pool grows: seconds and peak memory of each step, each in a process of its own.

Vectors are synthetic, 384 numbers each, in a memory-mapped file: 1,000 themes of long-tailed sizes (cosine about 0.3
within one), and one vector in ten is a copy of another at a cosine of 0.78 or more. The peak is that of anonymous
memory, Python and its libraries included: pages of the mapped file belong to the system, which takes them back at will.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIM, THEMES, COPIES = 384, 1000, 10  # one vector in COPIES is a copy
ROWS = 50_000  # made at once
EXACT_QUERIES = 20_000  # of plain FAISS; its time is proportional to the queries, so more are not asked
SAMPLE_SECONDS = 0.01
VECTORS, HIERARCHY = "vectors.npy", "hierarchy.pickle"


@dataclass(frozen=True)
class Cost:
    """One step at one size."""

    step: str
    size: int
    seconds: float
    cpu_seconds: float  # of all threads
    peak_mib: float
    note: str


def measure(sizes: Iterable[int], steps: Iterable[str]) -> Iterator[Cost]:
    """Each step at each size, as it is done: names of `STEPS`; `sample` and `retrieval` read what `kmeans` made."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            _write_vectors(Path(name), size)
            for step in steps:
                yield _in_a_process(step, Path(name), size)


class Clock:
    """Seconds of the part that counts."""

    seconds = cpu_seconds = 0.0

    @contextmanager
    def __call__(self):
        begun, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu


def dedup(vectors: NDArray[np.float32], folder: Path, clock: Clock) -> str:
    """Groups of duplicates at k = 64 and cosine 0.6, as `curate` makes them."""
    import pyarrow as pa

    from components.curation.config import IndexConfig
    from components.curation.deduplicate import group_duplicates

    side = pa.array(np.full(len(vectors), 512, np.int32))
    names = pa.array(np.arange(len(vectors))).cast(pa.string())
    images = pa.table({"image_id": names, "width": side, "height": side})
    with clock():
        groups = group_duplicates(vectors, images, 64, 0.6, IndexConfig())
    first = len(vectors) - len(vectors) // COPIES
    copies = np.arange(first, len(vectors))
    together = groups.label[copies] == groups.label[copies - first]
    return f"{together.mean():.4f} of the copies found, recall of the index {groups.recall:.3f}"


def exact(vectors: NDArray[np.float32], folder: Path, clock: Clock) -> str:
    """The same neighbors by plain FAISS: a flat index in memory, every product."""
    import faiss

    queries = vectors[:: max(1, len(vectors) // EXACT_QUERIES)]
    with clock():
        index = faiss.IndexFlatIP(DIM)
        index.add(np.asarray(vectors))
        added, cpu = time.perf_counter(), time.process_time()
        index.search(np.ascontiguousarray(queries), 65)
        searched, cpu = time.perf_counter() - added, time.process_time() - cpu
    clock.seconds += searched * (len(vectors) / len(queries) - 1)
    clock.cpu_seconds += cpu * (len(vectors) / len(queries) - 1)
    return f"from {len(queries)} queries" if len(queries) < len(vectors) else ""


def kmeans(vectors: NDArray[np.float32], folder: Path, clock: Clock) -> str:
    """Two levels of hierarchical k-means; as many clusters whatever the size."""
    from components.curation.cluster import hierarchical_kmeans
    from components.curation.config import LevelConfig

    levels = [LevelConfig(num_clusters=count, resampling_steps=2) for count in (1000, 100)]
    with clock():
        hierarchy = hierarchical_kmeans(vectors, levels, 10, 0)
    (folder / HIERARCHY).write_bytes(pickle.dumps(hierarchy))
    return "1,000 and 100 clusters, 2 resampling steps of 10 iterations"


def sample(vectors: NDArray[np.float32], folder: Path, clock: Clock) -> str:
    """A quarter of the images, balanced over the clusters."""
    from components.curation.sample import balanced_sample

    hierarchy = pickle.loads((folder / HIERARCHY).read_bytes())
    with clock():
        chosen = balanced_sample(hierarchy, len(vectors) // 4, np.random.default_rng(0))
    return f"{len(chosen):,} images"


def retrieval(vectors: NDArray[np.float32], folder: Path, clock: Clock) -> str:
    """The 4 nearest of 500 seeds, and images of the clusters of 500 others."""
    from components.curation.config import IndexConfig, SeedSetConfig
    from components.curation.retrieve import SeedSet, retrieve

    labels = pickle.loads((folder / HIERARCHY).read_bytes()).labels[0]
    sets = {
        "nearest": SeedSet(np.arange(500), SeedSetConfig(retrieve="sample", k=4)),
        "clusters": SeedSet(np.arange(500, 1000), SeedSetConfig(retrieve="cluster")),
    }
    everything = np.ones(len(vectors), np.bool_)
    index = IndexConfig(min_recall=0)  # random vectors have no near neighbors but copies
    with clock():
        found = retrieve(vectors, everything, labels, sets, index, np.random.default_rng(0))
    return ", ".join(f"{row.mode} {row.final:,}" for row in found.composition)


STEPS: dict[str, Callable[[NDArray[np.float32], Path, Clock], str]] = {
    one.__name__: one for one in (dedup, exact, kmeans, sample, retrieval)
}


def _write_vectors(folder: Path, size: int) -> None:
    generator = np.random.default_rng(0)
    themes = generator.standard_normal((THEMES, DIM), np.float32)
    share = 1 / np.arange(1, THEMES + 1)
    vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float32, (size, DIM))
    first = size - size // COPIES
    for start in [*range(0, first, ROWS), *range(first, size, ROWS)]:
        stop = min(start + ROWS, size if start >= first else first)
        block = generator.standard_normal((stop - start, DIM), np.float32)
        if start < first:
            block += np.float32(0.65) * themes[generator.choice(THEMES, stop - start, p=share / share.sum())]
        else:
            block *= generator.uniform(0, 0.8, (stop - start, 1)).astype(np.float32) / np.float32(DIM**0.5)
            block += vectors[start - first : stop - first]
        vectors[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()


def _in_a_process(step: str, folder: Path, size: int) -> Cost:
    command = [sys.executable, "-m", "tests.benchmarks.curation", step, str(folder)]
    peak = 0
    with (folder / "stderr").open("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            while process.poll() is None:
                peak = max(peak, _anonymous_kib(process.pid))
                time.sleep(SAMPLE_SECONDS)
            output = process.stdout.read() if process.stdout else ""
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{step} of {size} vectors failed: {errors.read()[-2000:]}")
    result = json.loads(output)
    return Cost(step, size, result["seconds"], result["cpu_seconds"], peak / 1024, result["note"])


def _anonymous_kib(process: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    clock = Clock()
    folder = Path(sys.argv[2])
    note = STEPS[sys.argv[1]](np.load(folder / VECTORS, mmap_mode="r"), folder, clock)
    sys.stdout.write(json.dumps({"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "note": note}))
