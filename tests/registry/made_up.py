"""A review made by hand, for tests of what is written of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.core.metrics import Interval
from components.lineage.provenance import DataVersion, Origin
from components.model.config import Preprocessing
from components.registry.config import GatesConfig
from components.registry.facts import Facts
from components.registry.gates import Evidence, judge
from components.registry.making import Curation, Making, Training
from components.registry.publish import Candidate
from components.registry.review import Beside, Review

ABOVE, UNCLEAR = Interval(0.132, 0.072, 0.192), Interval(0.01, -0.03, 0.05)


def making() -> Making:
    origin = Origin(
        commit="c" * 40, branch="runs/20260102-030405-abcd", dirty=False, lock_sha256="1" * 64,
        weights_path="models/adapted", weights_dvc="2" * 32 + ".dir", weights_sha256="3" * 64,
        pool=(DataVersion("data/pool/photos/ab12", "4" * 32 + ".dir", "5" * 64),), evaluation=(),
        curated=DataVersion("data/curated", "6" * 32 + ".dir", None),
    )  # fmt: skip
    costs: dict[str, Any] = {"hours": 0.25, "gpu_hours": None, "energy_kwh": 1.5, "co2e_kg": None}
    training = Training(stage="pretrain", steps=20, images_seen=640, loss=6.25, curve=((10, 8.0), (20, 6.25)), **costs)
    return Making(
        origin=origin,
        run="20260102-030405-abcd",
        parent=("models/pretrained", "7" * 64),
        backbone={"dim": 32, "depth": 2, "patch_size": 7, "num_registers": 1},
        preprocessing=Preprocessing(resize_size=32, crop_size=28),
        seed=7,
        trainings=(training,),
        curation=Curation(funnel=(("pool", 5), ("curated", 3)), origins={"balanced": 3}, rejected={"too_small": 2}),
        sources=(("<photos>", "CC0-1.0", 3),),
    )


def candidate(weights: Path, example: bytes, preprocessing: Preprocessing) -> Candidate:
    """Return a candidate of weights in a folder, beside which its empty results by image are put."""
    by_image = weights.with_name("by_image.parquet")
    by_image.touch()
    return Candidate(
        name="made-up",
        weights=weights,
        origin=making().origin,
        tags={},
        card="# card",
        passport=b"",
        documents={"croissant.json": b"{}"},
        making=making(),
        facts=review().facts,
        by_image=by_image,
        example=example,
        preprocessing=preprocessing,
        with_heads=False,
    )


def review(champion: str | None = None, beside: str | None = None, **changes: Any) -> Review:
    above = {"knn_top1": {"mean": 0.132, "low": 0.072, "high": 0.192}}
    evaluation = {"knn_top1": 0.804, "linear_c": 10.0, "random": {"knn_top1": 0.672}, "minus_random": above}
    facts = Facts(
        model="teacher", gates=GatesConfig(), evaluation={**evaluation, "num_test": 250}, champion=None, scored_on=(),
        decontaminated_against=(), evaluation_copies=0, snapshots=1, snapshots_passed=1, authors=("Ann",), size_mib=3.5,
        latency_ms=12.0, machine="x86_64",
    )  # fmt: skip
    shown = Beside(beside, {"knn_top1": 0.794}, {"knn_top1": UNCLEAR}) if beside else None
    values: dict[str, Any] = {
        "version": "tiny-candidates",
        "reigns": False,
        "champion": champion,
        "beside": shown,
        "facts": facts,
        "making": making(),
        "intervals": {"knn_top1": Interval(0.804, 0.75, 0.85)},
        "gates": judge(Evidence(facts)),
        "decisions": [],
        "unexplained": [],
    }
    return Review(**(values | changes))
