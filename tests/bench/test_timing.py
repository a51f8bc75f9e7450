import itertools

import pytest
import torch

from mixer.bench.timing import race, summary

CPU = torch.device("cpu")


def test_a_slower_way_is_seen_as_slower():
    """On a clock of our own: `slow` takes 3 ms, `fast` 1 ms, except in one disturbed round."""
    now, disturbed = [0.0], itertools.count()

    def take(seconds):
        now[0] += seconds * (50 if next(disturbed) == 5 else 1)
    ways = {"fast": lambda: take(0.001), "slow": lambda: take(0.003)}
    times, ratios = race(ways, 7, CPU, clock=lambda: now[0])
    assert times["fast"].median == pytest.approx(1.0)
    assert times["slow"].median == pytest.approx(3.0)
    assert ratios == {"fast": 1.0, "slow": pytest.approx(3.0)}


def test_ways_are_taken_in_turn_after_a_warm_up():
    calls = []
    race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert "".join(calls) == "ab" + 3 * "ab"


def test_summary():
    assert summary([5, 1, 2, 3, 4]) == (3, 2, 5)
