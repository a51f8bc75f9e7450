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
    ways = {(m.mode, m.way): m for m in measured}
    assert len(measured) == len(ways) == 2 * 5
    fused, eager = ways["forward + backward", "fused"], ways["forward", "eager"]
    activation = 4 * 8 * 8 * 4  # bytes of a sample
    assert fused.gb_s == pytest.approx(5 * 2 * activation / fused.ms / 1e6)
    assert eager.gb_s == pytest.approx(2 * 2 * activation / eager.ms / 1e6)
    assert eager.faster_than_eager == 1.0 and fused.p20 <= fused.ms <= fused.p80
    # PyTorch saves the statistics beside the activations, and so do we: two numbers per channel
    assert eager.saved_bytes_per_sample == pytest.approx(3 * activation, abs=64)
    assert fused.saved_bytes_per_sample == pytest.approx(activation, abs=64)


def test_several_inputs_give_the_time_of_one_pass(quick, monkeypatch):
    """On a clock of our own, where every forward pass takes one second."""
    now = [0.0]

    def forward(self, pair):
        now[0] += 1.0
        return pair[0]
    race = block.race
    monkeypatch.setattr(block, "race", lambda *args: race(*args, clock=lambda: now[0]))
    monkeypatch.setattr(block.BlockPasses, "forward", forward)
    monkeypatch.setattr(block, "COPIES", {"cpu": 4})
    monkeypatch.setattr(block, "PASSES", {"forward": 2})
    assert {m.ms for m in measure_block((2, 4, 6, 3), None, 3, CPU)} == {1000.0}


def test_the_fused_block_beside_eager_at_one_shape(quick):
    measured = measure_shape((2, 4, 6, 3), 3)
    assert [(m.dtype, m.mode) for m in measured] == [
        ("float32", "training"), ("float32", "evaluation"),
        ("bfloat16", "training"), ("bfloat16", "evaluation")]
    assert all(m.faster > 0 for m in measured)
