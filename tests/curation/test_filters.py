from __future__ import annotations

import numpy as np
import pytest

from components.curation.config import FilterConfig
from components.curation.filters import filter_images
from components.curation.rejections import CurationError, rejections, remaining


def test_each_filter_names_what_it_refuses(images):
    table = images([(16, 16), (15, 400), (129, 16), (128, 16), (16, 16)], ids=["a", "b", "c", "d", "a"])
    rejected = filter_images(table, FilterConfig(min_side=16, max_aspect_ratio=8)).to_pylist()
    assert [(row["row"], row["reason"], row["detail"]) for row in rejected] == [
        (1, "too_small", "15 x 400, shorter side < 16"),
        (2, "aspect_ratio", "129 x 16, ratio > 8"),
        (4, "exact_duplicate", "the same bytes are listed before"),
    ]
    assert rejected[2]["duplicate_of"] == "a"


def test_any_ratio_may_be_allowed(images):
    assert len(filter_images(images([(5000, 16)]), FilterConfig(max_aspect_ratio=None))) == 0


def test_nothing_left_is_an_error_that_says_why():
    rejected = rejections(np.array([0, 1]), ["too_small", "aspect_ratio"], "x")
    assert remaining(np.arange(3), rejected, "").tolist() == [2]
    with pytest.raises(CurationError, match=r"no image is left of 2: aspect_ratio 1, too_small 1; loosen it"):
        remaining(np.arange(2), rejected, "loosen it")
