"""The measure of equality between two networks."""
import copy

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.networks import randomise, relative_error


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="needs timm: pip install timm")


@pytest.fixture
def assert_same_network():
    """Give `model` the weights of `peer` through `load(model, state_dict)`, then compare them.
    Logits, every parameter's gradient and the running statistics, in eval and in train mode, agree
    to 1e-5 relative in fp32: some hundred roundings. Two orders of summation stay below it; a wrong
    eps, padding or activation does not (test_the_measure_rejects_spoilt_networks)."""
    def check(model, peer, load, image_size=64, memory_format=torch.contiguous_format):
        randomise(peer, seed=1)
        peer.to(memory_format=memory_format)  # the same for both: a ReLU's edge on the same side
        load(model, copy.deepcopy(peer.state_dict()))
        generator = torch.Generator().manual_seed(2)
        x = torch.rand(4, 3, image_size, image_size, generator=generator)
        x = x.contiguous(memory_format=memory_format)
        y = torch.tensor([0, 1, 1, 0])
        for training in (False, True):  # eval first: training changes the running statistics
            (logits, gradients), (peer_logits, peer_gradients) = (
                logits_and_gradients(network.train(training), x, y) for network in (model, peer))
            assert relative_error(logits, peer_logits) <= 1e-5
            assert_same_gradients(gradients, peer_gradients)
        for (name, ours), theirs in zip(model.named_buffers(), peer.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    return check


def logits_and_gradients(network, x, y):
    """(B, classes), {name: gradient of the cross-entropy}."""
    network.zero_grad()
    logits = network(x)
    F.cross_entropy(logits, y).backward()
    return logits.detach(), {name: p.grad for name, p in network.named_parameters()}


def assert_same_gradients(ours, theirs):
    """A gradient below 1e-6 of the whole must only be as small: a shift in front of a BatchNorm has
    none, and what is left there is rounding."""
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for (name, got), want in zip(ours.items(), theirs.values(), strict=True):
        if want.ndim > got.ndim:  # the patches of a convolution: (D, C, P, P) -> (D, P * P * C)
            want = want.permute(0, 2, 3, 1).flatten(1)
        if want.norm() < 1e-6 * total:
            assert got.norm() < 1e-5 * total, name
        else:
            assert relative_error(got, want) <= 1e-5, name
