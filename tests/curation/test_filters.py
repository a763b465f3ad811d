from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from components.curation.config import CurationError, FilterConfig
from components.curation.filters import filter_images
from components.curation.rejections import rejections, remaining
from components.curation.scores import SCORES_SCHEMA


@pytest.fixture
def pool_with(images):
    """Pool rows of 50 pixels square that have the given values in one column."""

    def pool_with(column: str, values: list[str]) -> pa.Table:
        table = images([(50, 50)] * len(values))
        return table.set_column(table.schema.get_field_index(column), column, pa.array(values))

    return pool_with


def no_nsfw(table: pa.Table) -> pa.Table:
    """Scores of colorful images that no classifier was asked about."""
    count = len(table)
    columns = {"gray_share": [0.1] * count, "entropy": [5.0] * count, "nsfw": [None] * count, "faces": [None] * count}
    return pa.table({"image_id": table["image_id"]} | columns, schema=SCORES_SCHEMA)


def refused(table: pa.Table, **limits) -> dict[int, tuple[str, str]]:
    rejected = filter_images(table, FilterConfig.model_validate(limits), no_nsfw(table)).to_pylist()
    return {row["row"]: (row["reason"], row["detail"]) for row in rejected}


def test_each_filter_names_what_it_refuses(images):
    table = images([(16, 16), (15, 400), (129, 16), (128, 16), (16, 16)], ids=["a", "b", "c", "d", "a"])
    rejected = filter_images(table, FilterConfig(min_side=16, max_aspect_ratio=8), no_nsfw(table)).to_pylist()
    assert [(row["row"], row["reason"], row["detail"]) for row in rejected] == [
        (1, "too_small", "15 x 400, shorter side < 16"),
        (2, "aspect_ratio", "129 x 16, ratio > 8"),
        (4, "exact_duplicate", "the same bytes are listed before"),
    ]
    assert rejected[2]["duplicate_of"] == "a"


def test_any_ratio_may_be_allowed(images):
    assert refused(images([(5000, 16)]), max_aspect_ratio=None) == {}


def test_formats(pool_with):
    table = pool_with("format", ["JPEG", "GIF", "PNG"])
    assert refused(table, formats=["JPEG", "PNG"]) == {1: ("format", "GIF, not JPEG, PNG")}


@pytest.mark.parametrize(
    ("uri", "blocked"),
    [
        ("https://example.com/a.jpg", True),
        ("HTTP://EXAMPLE.com:8080", True),
        ("https://cdn.example.com/a.jpg", True),
        ("https://user:p@ss@example.com./a.jpg?x", True),
        ("s3://example.com/a.jpg", True),
        ("https://notexample.com/a.jpg", False),
        ("https://example.com.org/a.jpg", False),
        ("https://examplescom/a.jpg", False),
        ("https://other.org/example.com/a.jpg", False),
        ("https://other.org?https://example.com/", False),
        ("https://example.com@other.org/a.jpg", False),
        ("example.com/a.jpg", True),  # a mirror of the site
        ("photos/example.com/a.jpg", False),
    ],
)
def test_a_blocked_domain_takes_its_sub_domains_and_nothing_else(pool_with, uri, blocked):
    expected = {0: ("blocked_source", "domain example.com")} if blocked else {}
    assert refused(pool_with("source_uri", [uri]), blocked_domains=["other.net", "example.com"]) == expected


def test_blocked_paths_are_globs_over_the_whole_uri(pool_with):
    table = pool_with(
        "source_uri", ["a/x.jpg", "a/b/x.jpg", "b/a/x.jpg", "a/x.png", "c/1+1.jpg", "c/1\n1.jpg", "c/111.jpg"]
    )
    assert refused(table, blocked_paths=["a/*.jpg", "c/1+1.jpg", "?/1\n*"]) == {
        0: ("blocked_source", "path a/*.jpg"),
        1: ("blocked_source", "path a/*.jpg"),
        4: ("blocked_source", "path c/1+1.jpg"),
        5: ("blocked_source", "path ?/1\n*"),
    }


def test_licenses(pool_with):
    table = pool_with("license", ["CC0-1.0", "CC-BY-NC-4.0", "unknown", "CC0-1.0 AND MIT"])
    blocked = {1: ("license", "CC-BY-NC-4.0 is blocked")}
    assert refused(table, blocked_licenses=["cc-by-nc-4.0"]) == blocked
    assert refused(
        table, allowed_licenses=["CC0-1.0", "CC-BY-NC-4.0"], blocked_licenses=["CC-BY-NC-4.0"]
    ) == blocked | {
        2: ("license", "unknown is not among those allowed"),
        3: ("license", "CC0-1.0 AND MIT is not among those allowed"),
    }


def test_the_first_filter_that_refuses_is_named(images):
    table = images([(5, 500)])
    limits = {"formats": ["GIF"], "allowed_licenses": ["none"], "blocked_paths": ["*"]}
    assert refused(table, **limits)[0][0] == "too_small"
    assert refused(table, **limits, min_side=1)[0][0] == "aspect_ratio"
    assert refused(table, **limits, min_side=1, max_aspect_ratio=None)[0][0] == "format"


def test_a_limit_on_a_score_that_was_not_computed_names_both_keys(images):
    table = images([(50, 50)])
    assert refused(table, min_entropy=1, max_gray_share=0.5) == {}
    with pytest.raises(CurationError, match=r"curate\.filters\.max_nsfw needs .* set embed\.scores\.nsfw"):
        refused(table, max_nsfw=0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"formats": ["HEIC"]},
        {"formats": []},
        {"allowed_licenses": []},
        {"blocked_domains": ["https://example.com"]},
        {"blocked_domains": ["*.example.com"]},
        {"max_gray_share": 1.1},
        {"min_entropy": 9},
    ],
)
def test_limits_out_of_range(values):
    with pytest.raises(ValidationError):
        FilterConfig.model_validate(values)


def test_nothing_left_is_an_error_that_says_why():
    rejected = rejections(np.array([0, 1]), ["too_small", "aspect_ratio"], "x")
    assert remaining(np.arange(3), rejected, "").tolist() == [2]
    with pytest.raises(CurationError, match=r"no image is left of 2: aspect_ratio 1, too_small 1; loosen it"):
        remaining(np.arange(2), rejected, "loosen it")
