"""The pointwise half of a layer, and the patch embedding, against their parts."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels import depthwise_cpu, fuse, unfuse
from kernels import module as kernels_module
from mixer.models import create_model
from tests.helpers.networks import randomise


@pytest.fixture(params=[False, True], ids=["contiguous", "channel-major"])
def channel_major(request, monkeypatch):
    monkeypatch.setattr(depthwise_cpu, "IMAGES_PER_ELEMENT", {})
    monkeypatch.setattr(depthwise_cpu, "FEWEST_IMAGES", 0 if request.param else math.inf)
    monkeypatch.setattr(depthwise_cpu, "NATIVE_BF16", request.param)


def unit(C, D, P):
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Conv2d(C, D, P, P), nn.GELU(), nn.BatchNorm2d(D))
    randomise(parts, seed=1)
    return parts


def fused_unit(*shape):
    return kernels_module._dense_for(unit(*shape), kernel_size=9)


def results(model, x, dy, of_x=True):
    """y, the gradients of x, if asked, and of the parameters, and the buffers."""
    leaf = x.clone().requires_grad_(of_x)
    y = model(leaf)
    gradients = torch.autograd.grad(y, [*[leaf] * of_x, *model.parameters()], dy.to(y.dtype))
    return [y.detach(), *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [True, False], ids=["", "of an image"])
@pytest.mark.parametrize("C, D, P, side", [(6, 5, 1, 8), (1, 4, 1, 4), (3, 8, 4, 16),
                                           (3, 8, 4, 18), (5, 5, 1, 9), (512, 6, 1, 8)])
def test_as_exact_as_its_parts(channel_major, C, D, P, side, dtype, of_x):
    """Each result has at most twice the error of the parts in the same dtype, against float64, and
    one rounding of its largest element. The errors are the largest of eight batches: a weight
    gradient of four elements is by luck three times as exact in one of them."""
    plain, fused = unit(C, D, P), fused_unit(C, D, P)
    exact = copy.deepcopy(plain).double()
    for training in (True, False):
        for model in (plain, fused, exact):
            model.train(training)
        largest = []
        for _ in range(8 if C < 512 else 1):
            x, dy = torch.randn(3, C, side, side), torch.randn(3, D, side // P, side // P)
            x, dy = x.to(dtype), dy.to(dtype)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                ours, theirs = (results(model, x, dy, of_x) for model in (fused, plain))
            right = results(exact, x.double(), dy.double(), of_x)
            errors = []
            for got, eager, want in zip(ours, theirs, right, strict=True):
                assert got.dtype == eager.dtype and got.shape == eager.shape
                errors.append([*((t.double() - want).abs().max() for t in (got, eager)),
                               torch.finfo(dtype).eps * want.abs().max()])
            largest.append(torch.tensor(errors))
        error, limit, floor = torch.stack(largest).amax(0).T
        assert (error <= 2 * limit + floor).all(), (error, limit, floor)


def test_it_saves_two_activations_and_asks_no_gradient_of_an_image(channel_major):
    fused, x = fused_unit(16, 16, 1), torch.randn(8, 16, 8, 8)
    saved = {}

    def save(t):
        return saved.setdefault(t.data_ptr(), t)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        y = fused(x)
    assert sum(t.nbytes for t in saved.values() if t.nbytes >= x.nbytes) == 2 * x.nbytes
    y.sum().backward()
    assert x.grad is None and fused[0].weight.grad is not None


def test_fuse_takes_it_in_and_unfuse_gives_it_back(channel_major, monkeypatch):
    """The layers of a ConvMixer and its patch embedding, in each memory format, both orders of
    `fuse` and `.to`."""
    calls, operation = [], kernels_module.dense_gelu_bn

    def counted(*args, **options):
        calls.append(1)
        return operation(*args, **options)
    monkeypatch.setattr(kernels_module, "dense_gelu_bn", counted)
    plain = create_model("convmixer", patch=4, dim=8, depth=2, kernel_size=5, image_size=32)
    randomise(plain, seed=2)
    x, dy = torch.randn(4, 3, 32, 32), torch.randn(4, 2)
    want = results(copy.deepcopy(plain), x, dy)
    for first, then in ((torch.contiguous_format, torch.channels_last),
                        (torch.channels_last, torch.contiguous_format)):
        model = copy.deepcopy(plain).to(memory_format=first)
        before = repr(model)
        assert fuse(model) == 2
        model.to(memory_format=then)
        calls.clear()
        got = results(model, x.to(memory_format=first), dy)
        assert len(calls) == 3
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        assert unfuse(model) == 2 and repr(model) == before
        calls.clear()
        model(x)
        assert not calls


def test_hooks_of_its_parts_are_called():
    fused, seen = fused_unit(4, 4, 1), []
    x = torch.randn(2, 4, 6, 6)
    y = fused(x)
    fused[1].register_forward_hook(lambda *_: seen.append(1))
    fused[2].reset_running_stats()
    torch.testing.assert_close(fused(x), y, rtol=1e-5, atol=1e-5)
    assert seen == [1]


def test_a_spoilt_gradient_would_be_seen(monkeypatch):
    conv_backward = depthwise_cpu._dense_conv_backward
    monkeypatch.setattr(depthwise_cpu, "_dense_conv_backward",
                        lambda dz, x, weight, needs_dx: conv_backward(dz, x, -weight, needs_dx))
    x, dy = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    ours = results(fused_unit(4, 4, 1), x, dy)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours[1], results(unit(4, 4, 1), x, dy)[1])


def test_batched_gradients_and_flops(channel_major):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    plain, fused, x = unit(3, 4, 2), fused_unit(3, 4, 2), torch.randn(5, 3, 8, 8)
    jacobians = [torch.autograd.functional.jacobian(
        lambda x, model=model: model(x).sum((2, 3)), x, vectorize=True) for model in (plain, fused)]
    torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-5)
    flops = []
    for model in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            model(x.requires_grad_()).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
