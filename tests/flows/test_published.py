"""What a pipeline run shows in MLflow's list of runs."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from mlflow import MlflowClient

from components.core import stage_runs
from components.core.layout import Layout
from components.lineage.provenance import Tag
from flows.published import metric_rows, score


def test_the_pipelines_run_has_scores_to_sort_by_and_the_verdicts(servers, tmp_path: Path):
    layout = Layout(tmp_path)
    for model, top1 in (("teacher", 0.75), ("small", 0.5)):
        path = layout.result("evaluate", model)
        path.parent.mkdir(parents=True)
        path.write_text(
            json.dumps({"knn_top1": top1, "roads/depth_rmse": 0.3, "linear_c": 10.0, "random": {"knn_top1": 0.1}})
        )
    layout.result("register").parent.mkdir(parents=True)
    made = {"name": "tiny-candidates", "version": "3", "verdict": "fails 1 of 11 gates: size", "failed_gates": ["size"]}
    layout.result("register").write_text(json.dumps({"teacher": made}))
    run = stage_runs.open_parent("20260102-030405-abcd", f"test-{uuid.uuid4().hex[:8]}", {})
    assert run is not None
    score(layout, run, metric_rows(layout.reports))
    data = MlflowClient().get_run(run).data
    depth = {f"{model}.roads/depth_rmse": 0.3 for model in ("teacher", "small")}
    assert data.metrics == {"teacher.knn_top1": 0.75, "small.knn_top1": 0.5, "teacher.failed_gates": 1, **depth}
    assert data.tags[Tag.SCORE] == "teacher: knn_top1 0.75; small: knn_top1 0.5"
    assert data.tags[Tag.VERDICT] == "teacher: tiny-candidates/3 fails 1 of 11 gates: size"
