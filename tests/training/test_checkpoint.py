import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.core.config import validate
from components.core.storage import write_json
from components.data.batch import Batch
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.pretraining.config import PretrainConfig
from components.training.alerts import FILE as ALERTS
from components.training.alerts import Alert, read_alerts
from components.training.checkpoint import Checkpoints, Progress, only_trainer, run_key
from components.training.checkpoint_store import INDEX, CheckpointError, LocalStore
from components.training.config import TrainingConfig
from components.training.loss_table import LOSSES, read_rows, write_rows
from components.training.networks import Network, self_distillation
from components.training.schedules import Schedules
from components.training.step import TrainingStep
from tests.training.jobs import at_call, make_job, train_job

SHARD = "shard-00001-model-00001-of-00001.safetensors"


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


def save(folder, training: TrainingStep, *steps: int) -> None:
    with Checkpoints(folder) as checkpoints:
        for done in steps:
            checkpoints.save(training, Progress(done))


def test_goes_on_bit_for_bit(tmp_path, config):
    """The state is that of the moment of saving, although the training goes on while it is written."""
    straight = start(config, seed=1)
    take_steps(straight, config, range(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(straight, Progress(3, skipped_steps=1))
        take_steps(straight, config, range(3, 6))

    resumed = start(config, seed=2)  # other initial weights: all must come from the checkpoint
    assert Checkpoints(tmp_path).load_newest(resumed) == Progress(3, skipped_steps=1)
    take_steps(resumed, config, range(3, 6))
    expected, found = state(straight), state(resumed)
    assert expected.keys() == found.keys()
    assert "objective/dino_centering.center" in expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_keeps_the_newest_two(tmp_path, config):
    training = start(config, seed=1)
    assert Checkpoints(tmp_path).load_newest(training) == Progress()
    save(tmp_path, training, 2, 4, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_4"]
    assert Checkpoints(tmp_path).load_newest(training) == Progress(10)  # by number, not by name
    Checkpoints(tmp_path).remove()
    assert not tmp_path.exists()


def test_a_machine_that_was_left_has_the_report_of_the_checkpoint(tmp_path, config):
    """What it knows of the run itself ends where the run went on elsewhere."""
    rows, told = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], [Alert(2, "starvation", "waits")]
    training = start(config, seed=1)
    write_rows(tmp_path / LOSSES, rows)
    write_json(tmp_path / ALERTS, [asdict(alert) for alert in told])
    save(tmp_path, training, 2)
    write_rows(tmp_path / LOSSES, rows[:1])
    (tmp_path / ALERTS).unlink()
    Checkpoints(tmp_path).load_newest(training)
    assert (read_rows(tmp_path / LOSSES), read_alerts(tmp_path)) == (rows, told)


def test_an_unfinished_save_is_not_seen(tmp_path, config):
    training = start(config, seed=1)
    save(tmp_path, training, 2)
    for name in (".step_3", ".step_4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path).load_newest(training) == Progress(2)
    save(tmp_path, training, 4)
    assert sorted(path.name for path in (tmp_path / "step_4").iterdir()) == [INDEX, SHARD]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_4"]  # halves are as large as wholes


def test_nothing_is_pickled_and_any_change_is_seen(tmp_path, config):
    training = start(config, seed=1)
    save(tmp_path, training, 2)
    folder = tmp_path / "step_2"
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, SHARD]
    tensors = load_file(folder / SHARD)  # safetensors' own reader takes it
    torch.testing.assert_close(tensors["ema/backbone.pos_embed"], training.networks.ema.backbone.pos_embed)
    whole = (folder / SHARD).read_bytes()
    damage = {
        SHARD: [whole[:1_000], whole[:-4] + bytes(4)],
        INDEX: [b"{}", b"x", b'{"progress": {}, "files": {"../a": {}}}'],
    }
    for name, contents in damage.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(
                CheckpointError, match=r"step_2: cannot be read \(.*\); remove it to go on from the one b"
            ):
                Checkpoints(tmp_path).load_newest(training)
        if name == SHARD:
            (folder / name).write_bytes(whole)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, config):
    save(tmp_path, start(config, seed=1), 2)
    for changes, difference in (
        (
            {"backbone": config.backbone.model_copy(update={"dim": 16})},
            r"ema/backbone.blocks.0.attn.proj.bias is \[32\]",
        ),
        (
            {"backbone": config.backbone.model_copy(update={"depth": 3})},
            r"ema/backbone.blocks.2.* is missing there, \[32",
        ),
    ):
        other = start(config.model_copy(update=changes), seed=1)
        with pytest.raises(CheckpointError, match=rf"step_2: cannot be read \(of another model: {difference}"):
            Checkpoints(tmp_path).load_newest(other)


def test_key_changes_with_what_determines_the_result_only():
    def key(facts=None, stage="pretrain", **changes) -> str:
        return run_key(stage, TrainingConfig.model_validate(changes), facts or {"seed": 0})

    same = key()
    assert key(num_processes=2, sharding="fsdp", max_skipped_steps=0, checkpoint_uri="s3://a/b") == same
    assert key(log_every_steps=7, checkpoint_every_steps=7, stream={"num_workers": 3}) == same
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


def test_a_process_waits_for_another_that_trains_the_same_run(tmp_path, caplog):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        ending = threading.Timer(0.6, holder.stdin.close)
        ending.start()
        with caplog.at_level(logging.INFO, "components"), only_trainer(tmp_path, "distill/small"):
            assert holder.wait() == 0
    message = "distill/small: another process is training this run (`pedigree train-status`); waiting for it"
    assert [record.getMessage() for record in caplog.records] == [message]
    assert not tmp_path.exists()  # nothing was begun


def test_a_run_is_taken_over_although_its_folder_goes_just_then(tmp_path, monkeypatch):
    """As when the process that held it deletes it at its end."""
    make, gone = Path.mkdir, []

    def make_in_vain(path: Path, *rest: bool, **more: bool) -> None:
        make(path, *rest, **more)
        if not gone:
            gone.append(path.rmdir())

    monkeypatch.setattr(Path, "mkdir", make_in_vain)
    with only_trainer(tmp_path / "run", "distill/small"):
        assert (tmp_path / "run" / "lock").exists()


def test_a_signal_waits_for_the_last_checkpoint_too(curated, pretrain_values, tmp_path, monkeypatch):
    """All steps are done, and the checkpoint behind them is being written: SIGTERM would throw them away."""
    commit, ended = LocalStore.commit, []

    def interrupted(store: LocalStore, step: int, index: dict) -> None:
        if step == 6:
            time.sleep(0.5)  # until the trainer waits for it
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        commit(store, step, index)

    monkeypatch.setattr(LocalStore, "commit", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(None))  # what would end the process
    try:
        train_job(make_job(pretrain_values(), curated), Checkpoints(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == []
    assert (tmp_path / "step_6" / INDEX).exists()


def test_a_run_whose_checkpoint_cannot_be_written_ends_at_once(curated, pretrain_values, tmp_path, monkeypatch):
    """Not when the next one is due: what it computes until then would be lost."""

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "commit", full)
    job, checkpoints = make_job(pretrain_values(steps=8, checkpoint_every_steps=4), curated), Checkpoints(tmp_path)

    def wait() -> None:
        while not checkpoints.failed():
            time.sleep(0.01)

    at_call(job, 4, wait)
    line = rf"not written to {re.escape(str(tmp_path))}, earlier ones remain: \[Errno 28\] No space left"
    with pytest.raises(CheckpointError, match=line):
        train_job(job, checkpoints)
    assert [row["step"] for row in read_rows(tmp_path / LOSSES)] == [1, 2, 3, 4, 5]
