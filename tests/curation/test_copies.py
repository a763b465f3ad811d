"""The ground truth of curation in small: the table of README.md is `python -m tests.benchmarks.copies`."""

from __future__ import annotations

from components.curation.descriptor import describe
from tests.benchmarks.copies import measure


def test_whole_copies_and_leaks_are_found_and_nothing_else_is_taken_for_one(sample):
    found = {(row.kind, row.against): row for row in measure(sample, describe, originals=100, seed=1)}
    for kind in ("exact", "re-encoded", "rescaled"):
        for against in ("pool", "evaluation"):
            assert min(found[kind, against].recall, found[kind, against].precision) >= 0.99
    assert found["watermarked", "pool"].recall >= 0.9
    assert found["flipped", "pool"].recall == 0  # README.md says so; a descriptor that finds them needs new words there
