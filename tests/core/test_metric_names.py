"""Names of metrics by set: free text in them is never taken for the name of a set."""

from __future__ import annotations

import pytest

from components.core.metric_names import first_asked, in_set, lower_is_better, sets_in, split_name


@pytest.mark.parametrize("metric", ["knn_top1", "segmentation_iou.sky/cloud", "slices.place=north/west", "mce"])
def test_a_name_is_taken_apart_as_it_was_made(metric):
    for evalset in (None, "streets", "2026-06"):
        assert split_name(in_set(metric, evalset)) == (evalset, metric)
        assert lower_is_better(in_set(metric, evalset)) == (metric == "mce")


def test_the_main_set_comes_first_and_others_have_one_measure():
    names = ["birds/effective_rank", "birds/linear_top1", "effective_rank", "knn_top1", "a/depth_rmse", "knn_top1_k5"]
    assert sets_in(names) == [None, "a", "birds"]
    assert first_asked(names) == ["knn_top1", "effective_rank", "a/depth_rmse", "birds/linear_top1"]
