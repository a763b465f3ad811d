"""Embedding and packing: the same bytes from a real Ray cluster of two nodes as from processes of this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from components.core.cluster import ADDRESS, Engine, choose_engine
from components.core.engine import map_shards
from components.core.errors import EngineError
from components.core.storage import sha256_dir
from components.curation.config import EmbedConfig, ModelConfig
from components.curation.stage import embed
from components.data.manifest import read_collection
from components.model.config import Preprocessing
from tests.core.test_engine import die_on_three, fail_on_three, slow_square
from tests.curation.test_curation_pack import packed
from tests.curation.test_embed import save_small_model

NODE = {
    "num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False,
    "object_store_memory": 80 * 2**20, "memory": 2**30,
}  # fmt: skip
CHILD = (
    "import time; from components.core.engine import map_shards; map_shards(time.sleep, [60] * 4, workers=2, what='x')"
)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder whose removal may meet a node's last words."""
    return tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes of one CPU each, which listen to this machine only."""
    with pytest.MonkeyPatch.context() as patch, _scratch() as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)  # Ray writes its address below it, and does not make the folder for that
        (Path(folder) / "ray").mkdir()
        patch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")  # read when Ray is imported, below; `connected` sets it too
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on the loopback address, as `connected` does it
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args=NODE | {"temp_dir": folder})
        try:
            nodes.add_node(**NODE)
            yield nodes.address
        finally:
            started = [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]
            nodes.shutdown()
        assert len(started) >= 2
        assert psutil.wait_procs(started, timeout=30)[1] == []


@pytest.fixture
def on_ray(cluster, monkeypatch):
    monkeypatch.setenv(ADDRESS, "")
    choose_engine(Engine.RAY, cluster)


def test_embeddings_and_scores_are_the_same_bytes(small_workspace, tmp_path_factory, cluster, monkeypatch):
    save_small_model(small_workspace / "weights")
    ours = ModelConfig(weights="weights", preprocessing=Preprocessing(resize_size=32, crop_size=28), batch_size=3)
    made = {}
    for engine, workers in ((Engine.LOKY, 1), (Engine.RAY, 2)):
        root = tmp_path_factory.mktemp("run") / "workspace"
        shutil.copytree(small_workspace, root)
        monkeypatch.setenv(ADDRESS, "")
        choose_engine(engine, cluster if engine is Engine.RAY else None)
        embed(EmbedConfig(workers=workers, semantic=ours), root, 0)
        made[engine, workers] = sha256_dir(root / "data/embeddings")
    assert len(set(made.values())) == 1


def test_packed_shards_and_blurred_faces_are_the_same_bytes(small_workspace, cluster, monkeypatch):
    pool = read_collection(small_workspace / "data/pool")
    faces = {row: [{"x": 40, "y": 30, "w": 50, "h": 60}] for row in (4, 7)}
    made = {}
    for engine, workers in ((Engine.LOKY, 1), (Engine.RAY, 2)):
        monkeypatch.setenv(ADDRESS, "")
        choose_engine(engine, cluster if engine is Engine.RAY else None)
        folder = small_workspace / f"{engine}{workers}"
        table = packed(small_workspace, pool, range(10), folder, max_bytes=120_000, faces=faces, workers=workers)
        assert len(set(table["shard"].to_pylist())) > 3
        made[engine, workers] = sha256_dir(folder)
    assert len(set(made.values())) == 1


def test_order_progress_and_errors(on_ray, caplog):
    caplog.set_level("INFO")
    assert map_shards(slow_square, range(7), workers=None, what="squares") == [0, 1, 4, 9, 16, 25, 36]
    assert "progress: squares on Ray 7/7 shards" in caplog.text
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        map_shards(fail_on_three, range(6), workers=2, what="reading")
    with pytest.raises(EngineError, match=r"reading on Ray: a worker process died .* fewer workers"):
        map_shards(die_on_three, range(6), workers=2, what="reading")


def test_the_cluster_stops_the_work_of_a_killed_driver_and_listens_to_this_machine_only(on_ray):
    def actors():
        return [p for p in psutil.process_iter(["cmdline"]) if "ray::PoolActor" in " ".join(p.info["cmdline"] or ())]

    def heard_at(process):
        with suppress(psutil.NoSuchProcess):  # an actor of the tests before that came late and goes
            return {c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections() if c.laddr}

    assert psutil.wait_procs(actors(), timeout=20)[1] == []  # of the tests before
    child = subprocess.Popen([sys.executable, "-c", CHILD], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while len(heard := [heard_at(p) for p in (*actors(), psutil.Process(child.pid))]) < 3 or not all(heard):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert set().union(*heard) == {"127.0.0.1"}
    finally:
        child.kill()
        child.wait()
    assert psutil.wait_procs(actors(), timeout=20)[1] == []


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv(ADDRESS, "127.0.0.1:9")
    with pytest.raises(
        EngineError, match=r"^no Ray cluster answers at 127\.0\.0\.1:9 \(.*refused\); start one, or use"
    ):
        map_shards(abs, range(2), workers=2, what="x")
    monkeypatch.setenv(ADDRESS, "ray")
    with pytest.raises(EngineError, match="expected HOST:PORT of a Ray cluster"):
        map_shards(abs, range(2), workers=2, what="x")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("components.core.cluster._reach", lambda _: "host")
    with pytest.raises(EngineError, match=r"not installed: pip install 'pedigree\[cluster\]'"):
        map_shards(abs, range(2), workers=2, what="x")
