from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.curation.config import CurationError
from components.curation.explain import CuratedTables, Mention, explain
from components.data.manifest import (
    CURATED_SCHEMA,
    MANIFEST,
    POOL_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    write_manifest,
    write_table,
)


def image_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def placed(name: str, **values) -> dict:
    row = dict.fromkeys(CURATED_SCHEMA.names) | {
        "image_id": image_id(name), "shard": "00000.tar", "offset": 512, "length": 1, "format": "PNG", "width": 9,
        "height": 9, "source": "photos", "source_uri": f"/in/{name}.png", "license": "CC0-1.0",
        "origin": "balanced", "group_id": image_id(name),
    }  # fmt: skip
    return row | values


def left_out(name: str, reason: str, of: str | None = None, similarity: float | None = None, **values) -> dict:
    row = {
        "image_id": image_id(name), "source": "photos", "source_uri": f"/in/{name}.png", "reason": reason,
        "duplicate_of": of and image_id(of), "similarity": similarity, "detail": "why",
    }  # fmt: skip
    return row | values


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> CuratedTables:
    root = tmp_path_factory.mktemp("explained")
    kept = [
        placed("large", cluster_path="3/17", gray_share=0.25, entropy=6.5),
        placed("seed", source="flowers", source_uri="s3://b/flowers.tar#rose.png", origin="seed", seed_set="flowers"),
        placed("near", origin="retrieved", seed_set="flowers", query_id=image_id("seed"), similarity=0.75),
        placed("blurred", derived_from=image_id("crowd"), source_uri="/in/crowd.png", group_id=image_id("crowd"),
               num_faces=3),
    ]  # fmt: skip
    out = [
        left_out("small", "near_duplicate", "large", 0.875, group_id=image_id("large")),
        left_out("leak", "evaluation_copy", "test", 0.5, group_id=image_id("leak")),
        left_out("icon", "too_small"),
        left_out("icon", "exact_duplicate", "icon", 1, source="other", source_uri="/other/icon.png"),
        left_out("large", "exact_duplicate", "large", 1, source="other", source_uri="/other/large.png"),
        left_out("more", "not_sampled", cluster_path="3/4", group_id=image_id("more")),
    ]
    write_manifest(pa.Table.from_pylist(kept, CURATED_SCHEMA), root / MANIFEST)
    write_table(pa.Table.from_pylist(out, REJECTED_SCHEMA), REJECTED_SCHEMA, root / REJECTED)
    test = {name: placed("test", source="benchmark")[name] for name in POOL_SCHEMA.names}
    write_manifest(pa.Table.from_pylist([test], POOL_SCHEMA), root / "evaluation/benchmark/ab12" / MANIFEST)
    return CuratedTables(root / MANIFEST, root / REJECTED, root / "evaluation")


def test_an_image_that_is_in(tables):
    found = explain(tables, image_id("large")[:12])
    assert (found.kept, found.reason, found.cluster_path) == (True, "balanced", "3/17")
    assert found.scores == {"gray_share": 0.25, "entropy": 6.5}
    assert found.group == [Mention(image_id("small"), "left out", "photos", "/in/small.png")]
    assert found.listed_again == ["other: /other/large.png"]
    assert found.packed_as is None
    near = explain(tables, "near.png")
    assert (near.reason, near.similarity, near.seed_set) == ("retrieved", 0.75, "flowers")
    assert near.other == Mention(image_id("seed"), "kept", "flowers", "s3://b/flowers.tar#rose.png")
    seed = explain(tables, "rose.png")
    assert (seed.reason, seed.other, seed.group) == ("seed", None, [])


def test_a_blurred_image_is_found_by_both_of_its_ids(tables):
    found = explain(tables, image_id("crowd"))
    assert found == explain(tables, image_id("blurred"))
    assert (found.image_id, found.packed_as) == (image_id("crowd"), image_id("blurred"))
    assert found.scores == {"num_faces": 3}
    assert found.group == []


def test_an_image_that_is_out(tables):
    small = explain(tables, "/in/small.png")
    assert (small.kept, small.reason, small.similarity, small.detail) == (False, "near_duplicate", 0.875, "why")
    assert small.other == Mention(image_id("large"), "kept", "photos", "/in/large.png")
    assert small.group == [small.other]
    assert explain(tables, image_id("leak")).other == Mention(
        image_id("test"), "evaluation set", "benchmark", "/in/test.png"
    )
    assert explain(tables, "more.png").cluster_path == "3/4"
    icon = explain(tables, image_id("icon"))
    assert (icon.reason, icon.listed_again) == ("too_small", ["other: /other/icon.png"])
    copy = explain(tables, "/other/icon.png")
    assert (copy.reason, copy.other) == (
        "exact_duplicate",
        Mention(image_id("icon"), "left out", "photos", "/in/icon.png"),
    )


def test_an_image_file_is_found_by_its_bytes(tables, tmp_path):
    (tmp_path / "renamed.png").write_bytes(b"more")
    assert explain(tables, str(tmp_path / "renamed.png")).reason == "not_sampled"


def test_no_image_several_images_and_no_tables(tables, tmp_path):
    with pytest.raises(CurationError, match=r"'nothing\.png': no such image in .*; give an id or a source URI"):
        explain(tables, "nothing.png")
    with pytest.raises(CurationError, match=r"2 images match: .*; give more of the id"):
        explain(_with_twins(tables, tmp_path), "ab12")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(CurationError, match=r"broken\.parquet: not a readable table"):
        explain(CuratedTables(tmp_path / "broken.parquet", tables.rejected), "large.png")

    old = pa.Table.from_pylist([placed("large")], CURATED_SCHEMA).drop_columns(["derived_from"])
    pq.write_table(old, tmp_path / "old.parquet")
    with pytest.raises(
        CurationError, match=r"old\.parquet: an older version .* without \['derived_from'\]; run it again"
    ):
        explain(CuratedTables(tmp_path / "old.parquet", tables.rejected), "large.png")


def _with_twins(tables, folder) -> CuratedTables:
    """The same, with two more images whose ids begin alike."""
    twins = [left_out(name, "too_small") | {"image_id": f"ab12{name * 60}"} for name in "cd"]
    write_table(pa.Table.from_pylist(twins, REJECTED_SCHEMA), REJECTED_SCHEMA, folder / REJECTED)
    return CuratedTables(tables.manifest, folder / REJECTED)
