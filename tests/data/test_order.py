from collections import Counter

import numpy as np
import pytest

from components.core.config import ConfigError, validate
from components.data.config import StreamConfig
from components.data.order import Order, Shuffle

SHARD = np.repeat(np.arange(12), 5)  # 60 rows in 12 shards, stored in this order
PARTS = {"seed": np.arange(0, 60, 12), "retrieved": np.arange(1, 60, 3), "balanced": np.arange(2, 60, 3)}
SHARES = {"seed": 0.1, "retrieved": 0.3, "balanced": 0.6}


def mixed(seed: int = 0) -> Order:
    parts = {name: Shuffle(rows, SHARD, 2, seed, 1 + k) for k, (name, rows) in enumerate(PARTS.items())}
    return Order(parts, SHARES, seed)


def part_of(row: int) -> str:
    return next(name for name, rows in PARTS.items() if row in rows)


def test_every_period_has_the_shares_and_every_part_its_own_epochs():
    order = mixed()
    assert order.period == 10
    rows = [order.row(position) for position in range(600)]
    for start in range(0, 600, 10):
        assert Counter(part_of(row) for row in rows[start : start + 10]) == {"seed": 1, "retrieved": 3, "balanced": 6}
    slots = {tuple(part_of(row) for row in rows[start : start + 10]) for start in range(0, 600, 10)}
    assert len(slots) > 40  # no fixed pattern, which a batch of the same size would meet again and again
    for members in PARTS.values():
        mine = [row for row in rows if row in members]
        epochs = [mine[start : start + len(members)] for start in range(0, len(mine), len(members))]
        assert len(epochs) >= 9
        assert all(sorted(epoch) == members.tolist() for epoch in epochs if len(epoch) == len(members))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_function_of_seed_and_position():
    rows = [mixed().row(position) for position in range(300)]
    order = mixed()
    for position in np.random.default_rng(0).permutation(300).tolist():
        assert order.row(position) == rows[position]
    assert [mixed(1).row(position) for position in range(300)] != rows


def test_positions_of_a_row_are_found_without_going_through_all():
    order = mixed()
    first, stop = 37, 433
    rows = np.array([order.row(position) for position in range(stop)])
    for row in (0, 1, 2, 24, 58):
        part = order._parts[list(PARTS).index(part_of(row))]
        expected = [p for p in range(first, stop) if rows[p] == row]
        assert order.positions(row, part, first, stop) == expected
        assert expected
    far = 10**12  # no epoch before it is drawn
    assert order.locate(far)[1] > 10**11
    assert order.positions(order.row(far), order.locate(far)[0], far, far + 1) == [far]


def test_windows_follow_each_other_through_the_epochs():
    shuffle = Shuffle(np.arange(60), SHARD, 5, 0)
    window, index = shuffle.window(0), 0
    for _ in range(7):
        assert [shuffle.row(index + k) for k in range(len(window.rows))] == window.rows.tolist()
        assert sorted(window.rows) == sorted(window.stored)
        assert len(np.unique(SHARD[window.rows])) <= 5
        index += len(window.rows)
        window = shuffle.after(window)
    assert index == 2 * 60 + 25


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"seed": 0.5, "balanced": 0.6}, "allowed: shares above 0 in steps of 0.001 that add up to 1"),
        ({"seed": 0.0, "balanced": 1.0}, "shares above 0"),
        ({"seed": 0.12345, "balanced": 0.87655}, "steps of 0.001"),
        ({}, "shares above 0"),
        ({"seeds": 1.0}, "'seed', 'retrieved' or 'balanced'"),
    ],
)
def test_refuses(mix, message):
    with pytest.raises(ConfigError, match=message):
        validate(StreamConfig, {"mix": mix}, "params.yaml")
