import itertools

import pytest
import torch

from mixer.bench import timing
from mixer.bench.timing import percentiles, race

CPU = torch.device("cpu")


def test_a_slower_candidate_is_seen_as_slower(monkeypatch):
    """On a clock of our own: `slow` takes 3 ms, `fast` 1 ms, except in one disturbed call."""
    now, disturbed = [0.0], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds * (50 if next(disturbed) == 7 else 1)
    candidates = {"fast": lambda: take(0.001), "slow": lambda: take(0.003)}
    for count in (1, 2):
        rows = race(candidates, 7, CPU, count)
        assert rows["fast"]["ms"] == pytest.approx(1.0) and rows["fast"]["faster"] == 1.0
        assert rows["slow"]["ms"] == pytest.approx(3.0)
        assert rows["slow"]["faster"] == pytest.approx(1 / 3)


def test_candidates_are_taken_in_turn_after_a_warm_up():
    calls = []
    race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU, count=2)
    assert "".join(calls) == "ab" + 3 * "aabb"


def test_percentiles():
    assert percentiles([5, 1, 2, 3, 4]) == {"ms": 3, "p20": 2, "p80": 5}
