import pytest
import torch
from torch import nn

from mixer.bench import block, timing
from mixer.bench.block import measure_block, measure_shape

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Nothing compiled in C++, no large copy."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)
    monkeypatch.setattr(timing, "COPY_FLOATS", 2**10)


def test_a_block_in_all_ways(quick):
    measured = measure_block((2, 4, 8, 9), None, 3, CPU)
    ways = {(row["mode"], row["way"]): row for row in measured}
    assert len(measured) == len(ways) == 2 * 5
    fused, eager = ways["forward + backward", "fused"], ways["forward", "eager"]
    activation = 4 * 8 * 8 * 4  # bytes of a sample
    assert fused["gb_s"] == pytest.approx(5 * 2 * activation / fused["ms"] / 1e6)
    assert eager["gb_s"] == pytest.approx(2 * 2 * activation / eager["ms"] / 1e6)
    assert eager["faster_than_eager"] == 1.0 and fused["p20"] <= fused["ms"] <= fused["p80"]
    # PyTorch saves the statistics beside the activations, and so do we: two numbers per channel
    assert eager["saved_bytes_per_sample"] == pytest.approx(3 * activation, abs=64)
    assert fused["saved_bytes_per_sample"] == pytest.approx(activation, abs=64)


def test_several_inputs_give_the_time_of_one_pass(quick, monkeypatch):
    """On a clock of our own, where every forward pass takes one second."""
    now, passes = [0.0], block.block_passes

    def slow_passes(*args):
        forward, steps, inputs = passes(*args)

        def slow(pair):
            now[0] += 1.0
        return forward, dict.fromkeys(steps, slow), inputs

    def copy():
        now[0] += 0.1
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(block, "large_copy", lambda device: (copy, 1.0))
    monkeypatch.setattr(block, "block_passes", slow_passes)
    monkeypatch.setattr(block, "COPIES", {"cpu": 4})
    assert {row["ms"] for row in measure_block((2, 4, 6, 3), None, 3, CPU)} == {1000.0}


def test_the_fused_block_beside_eager_at_one_shape(quick):
    measured = measure_shape((2, 4, 6, 3), 3)
    assert [(row["dtype"], row["mode"]) for row in measured] == [
        ("float32", "training"), ("float32", "evaluation"),
        ("bfloat16", "training"), ("bfloat16", "evaluation")]
    assert all(row["faster"] > 0 for row in measured)
