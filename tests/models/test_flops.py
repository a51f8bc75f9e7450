"""FLOPs of the nine rows are judged in tests/bench/test_measure.py, beside their saved bytes."""
import torch

from mixer.models.flops import forward_flops
from tests.helpers.networks import tiny_convmixer


def test_counting_flops_leaves_the_model_alone():
    model = tiny_convmixer().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    forward_flops(model, 32)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
