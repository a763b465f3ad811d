"""Progress lines: what is written is read back, and a long work writes fewer."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from components.core import progress as module
from components.core.log_levels import LevelFormatter, read_level
from components.core.progress import CHECKPOINT_LINE, ProgressLine, clock, progress, track


@pytest.mark.parametrize(
    "line",
    [
        ProgressLine("pretrain", 320, 800, "steps", 4.83, "loss 7.8238, 152.1 images/s"),
        ProgressLine("logistic regression of random", 1, 6, "values of C", 0.0123),
        ProgressLine("distill/small, distill/wide", 3, 3, "steps", 12.5, "loss 1.5000, 2.5000"),
        ProgressLine("archives", 1, 4, "archives", 0.00002),
        ProgressLine("k-means level 2", 0, 550, "iterations", 0.0),
        ProgressLine("pretrain", 1, 1000000, "steps", 0.5),  # 23 days
    ],
)
def test_a_line_that_is_written_is_read_back(line):
    assert ProgressLine.parse(str(line)) == line


def test_other_lines_are_none():
    for text in (
        "",
        "progress: ",
        "checkpoint after 5 steps",
        "embedding 3/4 shards",
        f"x {ProgressLine('a', 1, 2, 'b', 1)}",
    ):
        assert ProgressLine.parse(text) is None


def test_what_a_line_says():
    line = ProgressLine("pretrain", 320, 800, "steps", 4.0, "loss 7.5000")
    assert str(line) == "progress: pretrain 320/800 steps (4 steps/s, 0:02:00 left, loss 7.5000)"
    assert "unknown time left" in ProgressLine("a", 0, 4, "images", 0.0).figures
    assert clock(90061) == "1 day 1:01:01"


def test_lines_come_each_second_at_first_and_each_ten_later(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("work", 4000, "steps", start=1000) as advance:
        for second in range(1, 3001):
            now[0] = float(second)
            advance(1, f"loss {second}")
    times = [line.done - 1000 for text in caplog.messages if (line := ProgressLine.parse(text))]
    assert times[:3] == [1, 2, 3]
    assert times[-1] == 3000
    assert {later - earlier for earlier, later in pairwise(times[-100:-1])} == {10}
    assert caplog.messages[0] == "progress: work 1001/4000 steps (1 steps/s, 0:49:59 left, loss 1)"


def test_track_shows_the_first_and_the_last(caplog):
    caplog.set_level("INFO")
    assert list(track("abc", "letters", 3, "letters")) == ["a", "b", "c"]
    assert [line.done for text in caplog.messages if (line := ProgressLine.parse(text))] == [1, 3]


def test_a_level_is_a_word_in_front_of_the_line():
    def written(level: int, text: str) -> str:
        return LevelFormatter().format(logging.LogRecord("components", level, "", 0, text, (), None))

    assert written(logging.INFO, CHECKPOINT_LINE % 5) == "checkpoint after 5 steps"
    assert written(logging.WARNING, "few images") == "warning: few images"
    assert written(logging.ERROR, "one student diverged, the others go on") == (
        "warning: one student diverged, the others go on"
    )
    assert written(logging.ERROR, "error: no images") == "error: no images"
    assert read_level("warning: few images") == (logging.WARNING, "few images")
    assert read_level("error: no images") == (logging.ERROR, "no images")
    assert read_level("2 warning: no") == (logging.INFO, "2 warning: no")
