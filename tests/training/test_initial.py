"""Ranks that share networks start with the bits of one process, and none of them ever holds a whole network."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.core.config import validate
from components.core.distributed import local_shard
from components.model.config import HeadConfig, ViTConfig
from components.model.export import load_backbone, save_weights, to_dinov2
from components.model.head import ProjectionHead
from components.model.published import published_tensors
from components.model.vit import VisionTransformer
from components.pretraining.config import PretrainConfig
from components.training.initial import draw_network, load_network, start_backbone_from
from components.training.networks import Network, Networks, distillation, self_distillation
from components.training.parallelize import gather, launch, parallelize
from tests.training.jobs import load_heads

SEED = 7
SHAPE = ViTConfig(patch_size=8, dim=96, depth=8, num_heads=2, num_registers=1, image_size=16, ffn="swiglu")
SMALL = SHAPE.model_copy(update={"dim": 64, "ffn": "mlp", "num_registers": 0})
HEADS = {
    "dino": HeadConfig(num_prototypes=40, hidden_dim=24, bottleneck_dim=8),
    "ibot": HeadConfig(num_prototypes=36, hidden_dim=20, bottleneck_dim=8, num_layers=2),
}


def drawn(_: Path) -> Networks:
    """Alone, so that its parts and a block are less than one whole network."""
    network = draw_network(SHAPE, HEADS, SEED)
    return Networks(network, network, network)


def loaded(folder: Path) -> Networks:
    """Alone, too."""
    network = load_network(folder / "weights")
    return Networks(network, network, network)


def given(folder: Path) -> Networks:
    network = draw_network(SHAPE, HEADS, SEED)
    start_backbone_from(network, published_tensors(folder / "given.pth", SHAPE))
    return self_distillation(network, with_gram_teacher=True)


def distilled(folder: Path) -> Networks:
    return distillation(draw_network(SMALL, HEADS, SEED), load_network(folder / "weights"))


def on_each_rank(folder: Path) -> dict[str, list[int]]:
    """Make networks as the stages do, write what ranks put together; return [peak, allowed] bytes of rank 0."""
    torch.set_num_threads(1)
    values = {
        "sharding": "fsdp",
        "precision": "float32",
        "backbone": SHAPE.model_dump(),
        "crops": {"global_size": 16, "local_size": 8},
    }
    config, found = validate(PretrainConfig, values, "test"), {}
    mapped = {path.stat().st_size for path in folder.rglob("*")}
    for make in (drawn, loaded, given, distilled):
        networks, peak_before = peak_bytes(lambda make=make: make(folder), mapped)
        _, peak = peak_bytes(lambda networks=networks: parallelize(networks, config, torch.device("cpu")), mapped)
        distinct = networks.distinct()
        parts = sum(local_shard(p).nbytes for network in distinct for p in network.parameters())
        blocks = [block for network in distinct for block in network.backbone.blocks]
        largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)  # of whole blocks
        name = make.__name__
        found |= {f"{name}, made": [peak_before, largest], f"{name}, shared out": [peak, parts + largest]}
        for number, network in enumerate(distinct):
            if whole := gather(network):
                save_file(whole.state_dict(), folder / f"{name}_{number}")
    return found


def peak_bytes(act: Callable[[], Any], mapped: set[int]) -> tuple[Any, int]:
    """What `act` returns, and the most bytes that torch's allocator had handed out to it at once.

    Files that are mapped whole, whose sizes are given, are no memory of the process, but the profiler counts them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = act()
    kineto: Any = profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]" and abs(event.nbytes()) not in mapped]
    in_order = sorted(events, key=lambda event: event.start_ns())
    return result, max(accumulate((event.nbytes() for event in in_order), initial=0))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    """Folder of the networks that two ranks put together, and their bytes."""
    folder = tmp_path_factory.mktemp("initial")
    torch.manual_seed(1)
    backbone = VisionTransformer(SHAPE)
    save_weights(folder / "weights", backbone, {n: ProjectionHead(SHAPE.dim, head) for n, head in HEADS.items()}, {})
    torch.save({name: tensor.half() for name, tensor in to_dinov2(backbone).items()}, folder / "given.pth")
    return folder, launch(on_each_rank, 2, folder)


def drawn_by_one(shape: ViTConfig) -> Network:
    """As plain constructors draw it in one process."""
    torch.manual_seed(SEED)
    backbone = VisionTransformer(shape)
    return Network(backbone, {n: ProjectionHead(shape.dim, head) for n, head in HEADS.items()})


def assert_equal(path: Path, network: Network) -> None:
    found, expected = load_file(path), network.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_drawn_values_are_those_of_one_process(shared):
    folder, _ = shared
    assert_equal(folder / "drawn_0", drawn_by_one(SHAPE))


def test_given_values_are_those_of_the_file(shared):
    """And the heads beside a given backbone are drawn as if it had been drawn too."""
    folder, _ = shared
    expected = drawn_by_one(SHAPE)
    expected.backbone.load_state_dict(torch.load(folder / "given.pth", weights_only=True))
    for number in range(3):  # student, average, anchor
        assert_equal(folder / f"given_{number}", expected)
    assert_equal(folder / "loaded_0", Network(load_backbone(folder / "weights"), load_heads(folder / "weights")))


def test_teacher_of_distillation_and_its_student(shared):
    folder, _ = shared
    student, teacher, average = (folder / f"distilled_{number}" for number in range(3))
    assert_equal(student, drawn_by_one(SMALL))
    assert_equal(average, drawn_by_one(SMALL))
    assert_equal(teacher, Network(load_backbone(folder / "weights"), load_heads(folder / "weights")))


def test_no_rank_holds_more_than_its_parts_and_a_block(shared):
    assert len(shared[1]) == 8
    assert {name: figures for name, figures in shared[1].items() if figures[0] > figures[1]} == {}
