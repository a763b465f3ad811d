"""The model card: what a reviewer reads before a decision."""

from components.registry.card import render_card
from tests.registry.made_up import review


def test_verdict_first_then_the_measures_beside_the_champion_and_random_weights():
    card = render_card(review("tiny/3", "tiny/3"), {"passport": "#/a", "run": "#/b"}).split("\n\n")
    assert card[0] == (
        "**tiny-candidates passes 10 of 11 gates, 1 at the decision.** It is shown beside the champion, tiny/3."
    )
    assert card[1] == (
        "- `knn_top1` 0.804 (0.750 to 0.850); tiny/3 0.794, difference +0.010 (-0.030 to +0.050); "
        "random weights 0.672, difference +0.132 (+0.072 to +0.192)"
    )
    assert "Training steps: pretrain 20. Training set: 3 images; <photos> (CC0-1.0) 3." in card
    assert "[passport](#/a) · [run](#/b)" in card


def test_no_table_and_no_setting_among_the_measures():
    card = render_card(review(), {})
    assert not [line for line in card.splitlines() if line.startswith("|")]
    assert "linear_c" not in card


def test_without_a_champion_the_last_candidate_is_named_as_such():
    assert (
        "There is no champion yet; it is shown beside the last candidate before it, tiny-candidates/2."
        in render_card(review(beside="tiny-candidates/2"), {})
    )
    assert "There is no champion yet, and there is no earlier candidate." in render_card(review(), {})


def test_the_champion_itself_stands_beside_the_one_before():
    card = render_card(review("tiny/2", "tiny/2", version="tiny/3", reigns=True), {})
    assert "It is the champion, shown beside the champion before, tiny/2." in card
    assert "It is the first champion, and there is no earlier candidate." in render_card(review(reigns=True), {})
