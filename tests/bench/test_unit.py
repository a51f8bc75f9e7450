import pytest
import torch
from torch import nn

from mixer.bench.unit import measure_unit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Nothing compiled in C++."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)


def test_a_unit_in_all_ways():
    measured = measure_unit((2, 4, 8, 9), [None], 3, CPU)
    ways = {(row["mode"], row["candidate"]): row for row in measured}
    assert len(measured) == len(ways) == 2 * 4
    fused, eager = ways["training", "fused"], ways["evaluation", "eager"]
    assert eager["faster"] == 1.0 and fused["p20"] <= fused["ms"] <= fused["p80"]
    # PyTorch saves the statistics beside the activations, and so do we: two numbers per channel
    activation = 4 * 8 * 8 * 4  # bytes of a sample
    assert eager["saved_bytes_per_sample"] == pytest.approx(3 * activation, abs=64)
    assert fused["saved_bytes_per_sample"] == pytest.approx(activation, abs=64)


def test_the_fused_unit_beside_eager_in_both_dtypes():
    measured = measure_unit((2, 4, 6, 3), (None, torch.bfloat16), 3, CPU, ("eager", "fused"))
    assert [(row["dtype"], row["mode"], row["candidate"]) for row in measured] == [
        (dtype, mode, name) for dtype in ("float32", "bfloat16")
        for mode in ("training", "evaluation") for name in ("eager", "fused")]
    assert all(row["faster"] > 0 and row["shape"] == "2, 4, 6x6, 3" for row in measured)
