import csv
import math

import pytest
import torch

from components.training.loss_table import append_row, read_rows, write_rows
from components.training.monitors import describe_targets


def test_targets_that_say_nothing_and_targets_that_say_all():
    """One row in 32 for each prototype; then all rows alike, whose centre takes everything away."""
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
