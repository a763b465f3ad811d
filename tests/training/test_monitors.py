import csv
import math
from types import SimpleNamespace

import pytest
import torch

from components.training import monitors
from components.training.alerts import Alerts, Watch
from components.training.config import EnergyConfig, TrainingConfig
from components.training.cost import CostMeter
from components.training.loss_table import append_row, read_rows, write_rows
from components.training.monitors import Instruments, Monitor, Probes, describe_targets
from components.training.schedules import Schedules
from components.training.step import StepOutput


def test_targets_that_say_nothing_and_targets_that_say_all():
    """One row in 32 for each prototype; then all rows alike, whose center takes everything away."""
    sharp = describe_targets(torch.eye(32) * 1e3, 0.05)
    assert sharp.entropy == pytest.approx(0.0, abs=1e-6)
    assert (sharp.used, sharp.perplexity) == (1.0, pytest.approx(32))
    flat = describe_targets(torch.ones(6, 32), 0.05)
    assert flat.entropy == pytest.approx(math.log(32))
    assert flat.used == 1 / 32
    # Three rows of one prototype against one of another: entropy of (3/4, 1/4), when temperatures leave no doubt.
    few = torch.zeros(4, 8)
    few[:3, 1] = few[3, 2] = 1e3
    figures = describe_targets(few, 0.05)
    assert figures.used == 2 / 8
    assert math.log(figures.perplexity) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-5)


def test_figures_of_time_and_cost(tmp_path, monkeypatch):
    """Two rows of two steps of 8 images, the first while two runs train together; then the second again, resumed."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(monitors, "time", clock)
    settings = {
        "steps": 4,
        "batch_size": 8,
        "log_every_steps": 2,
        "precision": "bfloat16",
        "teacher": {"temp_warmup_steps": 0},
    }
    settings["optimizer"] = {"warmup_steps": 0, "freeze_last_layer_steps": 0}
    config, path = TrainingConfig.model_validate(settings), tmp_path / "loss.csv"
    watch = Watch(Alerts(tmp_path, 0), config.monitor.alerts, after_steps=4, max_entropy=2.0)
    cost = CostMeter(torch.device("cpu"), 1, EnergyConfig(device_watts=400))
    tools = Instruments(watch, cost, lambda steps_done: 10.0 * steps_done, 100.0, Probes())

    def take(monitor: Monitor, step: int, waited: float, *, first: int = 0, together: int = 1) -> None:
        """A step of loss `step` and of four seconds, some of which went by while it waited."""
        clock.now += waited
        if step == first:
            monitor.start_clock(waited)
        monitor.waited(waited)
        clock.now += 4.0 - waited
        seen = torch.randn(16, 8), torch.randn(16, 8), torch.tensor(0.5)
        output = StepOutput({"total": torch.tensor(float(step))}, {"backbone": torch.tensor(2.0)}, *seen)
        monitor.record(output, Schedules(config).at(step), step + 1, last=step == 3, together=together)

    whole = Monitor(path, config, tools, 0)
    for step, waited in enumerate((1.0, 3.0)):
        take(whole, step, waited, together=2)
    for step in (2, 3):
        take(whole, step, 0.5)
    first, second = whole.rows
    names = ("step", "loss_total", "images_per_second", "data_wait_share", "mfu", "hours", "energy_kwh")
    kwh = 0.4 * 1.1 / 3600
    assert [first[name] for name in names] == pytest.approx([2, 0.5, 2.0, 0.5, 0.4, 4 / 3600, 4 * kwh])
    assert [second[name] for name in names] == pytest.approx([4, 2.5, 2.0, 0.125, 0.8, 12 / 3600, 12 * kwh])
    resumed = Monitor(path, config, tools, 2)
    assert resumed.rows == [first]
    clock.now += 50.0  # until it begins
    for step in (2, 3):
        take(resumed, step, 0.5, first=2)
    assert [resumed.rows[1][name] for name in names] == pytest.approx([second[name] for name in names])
    assert [row["step"] for row in read_rows(path)] == [2, 4]


def test_rows_keep_what_is_empty_and_drop_what_is_half_written(tmp_path):
    path = tmp_path / "loss.csv"
    append_row(path, {"step": 1, "loss": 0.5, "mfu": None})
    append_row(path, {"step": 2, "loss": 0.25, "mfu": 0.125})
    rows = [{"step": 1, "loss": 0.5, "mfu": None}, {"step": 2, "loss": 0.25, "mfu": 0.125}]
    with path.open("a") as file:
        file.write("3,0.12")
    assert read_rows(path) == rows
    write_rows(path, read_rows(path)[:1])
    append_row(path, rows[1])
    assert read_rows(path) == rows
    write_rows(path, [])
    append_row(path, rows[0])
    assert read_rows(path) == rows[:1]


def test_rows_are_replaced_at_once(tmp_path, monkeypatch):
    """Killed while it puts its report in order, a run must find the old one."""
    path, rows = tmp_path / "loss.csv", [{"step": step, "loss": 0.5} for step in (1, 2, 3)]
    write_rows(path, rows)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerow", kill)
    monkeypatch.setattr(csv.DictWriter, "writerows", kill)
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, rows)
    assert read_rows(path) == rows
