"""Scores and intervals against values computed by hand."""

from __future__ import annotations

import pytest

from redknot_hf.eval.scoring import contains, found_any, found_share, interval, token_f1


@pytest.mark.parametrize(
    "answer, reference, found",
    [
        (" 1234567.", "1234567", True),
        ("12345678", "1234567", False),
        ("01234567", "1234567", False),
        ("The answer is  New\nYork", "new york", True),
        ("newyork", "york", False),
        ("a (b) c", "(b)", True),
        ("anything", "", False),
        ("", "x", False),
    ],
)
def test_contains_looks_for_whole_words(answer, reference, found):
    assert contains(answer, reference) is found


def test_shares():
    assert found_share("1, 2 and 5", ["1", "2", "3", "4"]) == 0.5
    assert found_share("1 1 1 1", ["1", "2"]) == 0.5
    assert found_share("nothing", ["1"]) == 0.0
    assert found_any("it was Rome", ["Athens", "rome"]) == 1.0
    assert found_any("it was Romeo", ["Athens", "rome"]) == 0.0


def test_f1_is_of_the_first_line():
    assert token_f1("The red house", ["red house"]) == 1.0
    assert token_f1("red", ["red house"]) == pytest.approx(2 / 3)
    assert token_f1("\n\nred house\nblue", ["red house", "blue"]) == 1.0
    assert token_f1("green", ["red house"]) == 0.0
    assert token_f1("", ["red house"]) == 0.0


def test_intervals():
    low, high = interval([1.0] * 10)  # Wilson: 10 of 10 is not certainty
    assert low == pytest.approx(0.7225, abs=1e-3) and high == 1.0
    low, high = interval([1.0, 0.0] * 10)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-3)
    low, high = interval([0.25, 0.5, 0.75, 0.5] * 10)  # standard error 0.028
    assert 0.43 < low < 0.46 and 0.54 < high < 0.57
