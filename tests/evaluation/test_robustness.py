import numpy as np
import pytest

from components.core.errors import DatasetError
from components.evaluation.protocols.robustness import CorruptedResults, evaluate


def results(model, clean, **errors):
    """100 images, of which the stated numbers are wrong."""

    def right(wrong):
        return (np.arange(100) >= wrong).astype(float)

    return CorruptedResults(
        model, right(clean), {name: np.stack([right(wrong) for wrong in rows]) for name, rows in errors.items()}
    )


def test_mce_by_hand():
    ours = results("ours", 10, fog=(20, 40), snow=(30, 60))
    reference = results("random", 20, fog=(40, 80), snow=(50, 70))
    scores = evaluate(ours, reference)
    # CE: 60 / 120 and 90 / 120. Relative: (60 - 20) / (120 - 40) and (90 - 20) / (120 - 40).
    assert scores.metrics["mce"] == pytest.approx((0.5 + 0.75) / 2)
    assert scores.metrics["relative_mce"] == pytest.approx((0.5 + 0.875) / 2)
    assert scores.metrics["corruption_accuracy.fog"] == pytest.approx(0.7)
    assert scores.metrics["corruption_accuracy"] == pytest.approx((0.7 + 0.55) / 2)
    assert scores.by_image["corruption_accuracy"].shape == (100,)
    assert scores.notes["mce_reference"] == "random"
    np.testing.assert_allclose(scores.curves["snow"], [0.9, 0.7, 0.4])


def test_the_reference_itself_is_one():
    ours = results("ours", 10, fog=(20, 40, 50, 60, 70), snow=(30, 60, 61, 62, 63))
    scores = evaluate(ours, ours)
    assert (scores.metrics["mce"], scores.metrics["relative_mce"]) == (pytest.approx(1), pytest.approx(1))


def test_corruptions_that_do_not_harm_the_reference_are_left_out_and_told(caplog):
    ours = results("ours", 10, fog=(20,), snow=(30,))
    scores = evaluate(ours, results("near chance", 90, fog=(90,), snow=(95,)))
    assert scores.metrics["mce"] == pytest.approx((20 / 90 + 30 / 95) / 2)
    assert scores.metrics["relative_mce"] == pytest.approx(20 / 5)
    assert "relative_mce: 1 of 2 corruptions left out" in caplog.text
    assert "(fog)" in caplog.text
    scores = evaluate(ours, results("perfect", 0, fog=(0,), snow=(0,)))
    assert not {"mce", "relative_mce"} & set(scores.metrics)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (results("other", 10, fog=(20, 40)), "snow of only one of ours and other"),
        (
            results("other", 10, fog=(20,), snow=(30,)),
            "fog of other has 1 severities of 100 images instead of 2 of 100",
        ),
    ],
)
def test_unlike_measurements(reference, message):
    with pytest.raises(DatasetError, match=message):
        evaluate(results("ours", 10, fog=(20, 40), snow=(30, 60)), reference)


def test_no_corruptions():
    with pytest.raises(DatasetError, match="no corruptions"):
        evaluate(results("ours", 1), results("other", 1))
