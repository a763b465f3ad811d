"""The model card: what a reviewer reads before a decision."""

from components.registry.card import _evaluation


def test_each_metric_stands_beside_those_it_is_compared_with():
    interval = {"mean": 0.132, "low": 0.072, "high": 0.192}
    results = {
        "knn_top1": 0.804,
        "minus_random": {"knn_top1": interval},
        "num_test": 250,
        "random": {"knn_top1": 0.672},
    }
    assert _evaluation(results | {"random": {"knn_top1": 0.672}}).splitlines() == [
        "| metric | this model | random | minus random |",
        "| --- | --- | --- | --- |",
        "| `knn_top1` | 0.804 | 0.672 | +0.132 (+0.072 to +0.192) |",
        "| `num_test` | 250 |  |  |",
    ]
    assert _evaluation({}) == "Not evaluated."
