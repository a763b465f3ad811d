import json
import subprocess
import sys

import pytest
import torch

from components.core.config import validate
from components.data.batch import Batch
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.pretraining.config import PretrainConfig
from components.training.checkpoint import CheckpointError, Checkpoints, Progress, only_trainer, run_key
from components.training.config import TrainingConfig
from components.training.networks import Network, self_distillation
from components.training.schedules import Schedules
from components.training.step import TrainingStep


@pytest.fixture
def config(pretrain_values) -> PretrainConfig:
    return validate(PretrainConfig, pretrain_values(objective={"centering": "softmax"}), "test")


def start(config: PretrainConfig, seed: int) -> TrainingStep:
    torch.manual_seed(seed)
    heads = {"dino": config.dino_head, "ibot": config.ibot_head}
    network = Network(
        VisionTransformer(config.backbone), {n: ProjectionHead(config.backbone.dim, h) for n, h in heads.items()}
    )
    return TrainingStep(self_distillation(network), config, seed=0, device=torch.device("cpu"))


def take_steps(training: TrainingStep, config: PretrainConfig, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        crops = [torch.randn(n, 3, s, s, generator=generator) for n, s in ((16, 32), (16, 16))]
        batch = Batch(crops[0], crops[1], torch.rand(16, 16, generator=generator) < 0.3, [])
        training(batch, step, Schedules(config).at(step))


def state(training: TrainingStep) -> dict[str, torch.Tensor]:
    networks = training.networks
    modules = {"student": networks.student, "ema": networks.ema, "objective": training.objective}
    return {f"{m}/{name}": t.clone() for m, module in modules.items() for name, t in module.state_dict().items()}


def test_goes_on_bit_for_bit(tmp_path, config):
    straight = start(config, seed=1)
    take_steps(straight, config, range(3))
    Checkpoints(tmp_path).save(straight, Progress(3))
    take_steps(straight, config, range(3, 6))

    resumed = start(config, seed=2)  # other initial weights: all must come from the checkpoint
    assert Checkpoints(tmp_path).load_newest(resumed) == Progress(3)
    take_steps(resumed, config, range(3, 6))
    expected, found = state(straight), state(resumed)
    assert expected.keys() == found.keys()
    assert "objective/dino_centering.center" in expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_keeps_the_newest_two(tmp_path, config):
    training = start(config, seed=1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_newest(training) == Progress()
    for steps in (2, 4, 10):
        checkpoints.save(training, Progress(steps))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_4"]
    assert checkpoints.load_newest(training) == Progress(10)  # by number, not by name
    checkpoints.remove()
    assert not tmp_path.exists()


def test_an_unfinished_save_is_not_seen(tmp_path, config):
    training = start(config, seed=1)
    Checkpoints(tmp_path).save(training, Progress(2))
    (tmp_path / ".step_4.abc").mkdir()
    assert Checkpoints(tmp_path).load_newest(training) == Progress(2)


def test_a_damaged_checkpoint_is_named(tmp_path, config):
    training = start(config, seed=1)
    Checkpoints(tmp_path).save(training, Progress(2))
    tensors = tmp_path / "step_2" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1_000])
    with pytest.raises(CheckpointError, match=r"step_2: cannot be read \(.*\); remove this folder"):
        Checkpoints(tmp_path).load_newest(training)


def test_nothing_is_pickled(tmp_path, config):
    training = start(config, seed=1)
    take_steps(training, config, range(1))
    Checkpoints(tmp_path).save(training, Progress(1))
    assert sorted(p.name for p in (tmp_path / "step_1").iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "step_1" / "state.json").read_text()) == {"steps_done": 1, "skipped_steps": 0}


def test_key_changes_with_what_determines_the_result_only():
    def key(facts=None, stage="pretrain", **changes) -> str:
        return run_key(stage, TrainingConfig.model_validate(changes), facts or {"seed": 0})

    same = key()
    assert key(num_processes=2, log_every_steps=7, checkpoint_every_steps=7, stream={"num_workers": 3}) == same
    others = {
        key(batch_size=64), key(steps=700_000), key(stream={"window_shards": 3}), key(stage="adapt"),
        key(facts={"seed": 1}), key(precision="float32"),
    }  # fmt: skip
    assert len(others | {same}) == 7


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_train_the_same_run(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is training this very run"), only_trainer(tmp_path):
            pass
        holder.communicate()
    with only_trainer(tmp_path):  # it ended: the run is free again
        pass
