import math

import pytest

from mixer.report.intervals import (
    Interval,
    accuracy_intervals,
    best_of,
    frontier,
    student_t,
    wilson,
)


def test_one_seed_has_the_interval_of_its_validation_images_also_at_accuracy_1():
    intervals = accuracy_intervals({"a": [0.8], "b": [1.0], "none": []}, val_images=2500)
    assert list(intervals) == ["a", "b"]
    assert intervals["a"].half == pytest.approx(0.8 - wilson(2000, 2500)[0])
    assert intervals["b"].half == pytest.approx(1.96**2 / (2500 + 1.96**2))


def test_the_variance_between_seeds_is_pooled_over_the_rows():
    """Two rows of three seeds: variances 0.0001 and 0.0009, four degrees of freedom."""
    intervals = accuracy_intervals({"a": [0.79, 0.80, 0.81], "b": [0.67, 0.70, 0.73], "c": [0.6]},
                                   val_images=10**9)
    half = 2.776 * math.sqrt(0.0005 / 3)
    assert intervals["a"] == pytest.approx((0.80, half))
    assert intervals["b"] == pytest.approx((0.70, half))
    assert intervals["c"] == pytest.approx((0.60, half * math.sqrt(3)))


def test_seeds_that_agree_by_chance_are_not_trusted_beyond_the_error_of_their_images():
    half = accuracy_intervals({"a": [0.8, 0.8]}, val_images=2500)["a"].half
    assert half == pytest.approx(0.8 - wilson(4000, 5000)[0])


def test_more_seeds_do_not_reduce_the_error_of_images_that_they_share():
    half = accuracy_intervals({"a": [0.79, 0.80, 0.81]}, val_images=2500, shared=True)["a"].half
    assert half == pytest.approx(math.hypot(4.303 * 0.01 / 3**0.5, 0.8 - wilson(2000, 2500)[0]))


def test_students_t():
    assert student_t(2) == 4.303
    # beyond the table; from a table of statistics
    assert [round(student_t(freedom), 2) for freedom in (24, 30, 60)] == [2.06, 2.04, 2.0]


def test_intervals_that_overlap_the_best_one_share_its_place():
    intervals = {"a": Interval(0.80, 0.02), "b": Interval(0.77, 0.011), "c": Interval(0.77, 0.009)}
    assert best_of(intervals) == {"a", "b"} and best_of({}) == set()


def test_the_frontier():
    intervals = {"cheap": Interval(0.70, 0.01), "better": Interval(0.80, 0.01),
                 "no better": Interval(0.81, 0.01), "worse": Interval(0.75, 0.01),
                 "one": Interval(0.9, 0.01), "the same": Interval(0.9, 0.01)}
    costs = {"cheap": 1, "better": 2, "no better": 3, "worse": 4, "one": 5, "the same": 5}
    assert frontier(costs, intervals) == {
        "cheap": "yes", "better": "yes", "no better": "tie", "worse": "no", "one": "tie",
        "the same": "tie"}
