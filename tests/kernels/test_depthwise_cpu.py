"""The CPU's implementation of both halves of a layer, and the reference, against float64."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels import depthwise_cpu, depthwise_gelu_bn, fuse, reference, unfuse
from kernels import module as kernels_module
from mixer.models import create_model
from tests.helpers.networks import randomise, results
from tests.helpers.units import exact, make_unit, run, saved_bytes, too_far

# N, C, H, W, K
SHAPES = [(3, 2, 8, 8, 9), (5, 2, 12, 12, 9), (2, 3, 16, 16, 7), (1, 2, 32, 32, 3), (3, 1, 7, 5, 3),
          (2, 2, 5, 9, 11), (4, 3, 3, 3, 1), (2, 2, 1, 6, 5)]
SMALL_MAPS = [shape for shape in SHAPES if shape[1] > 1 and shape[2] * shape[3] <= 64]
OPTIONS = [{}, dict(fixed_stats=True, residual=False), dict(bare=True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["channel-major", "contiguous"])
def channel_major(request, monkeypatch):
    """Small maps of any batch as products, bfloat16 as on a CPU that has products of it; or the
    opposite of both."""
    monkeypatch.setattr(depthwise_cpu, "IMAGES_PER_ELEMENT", {})
    monkeypatch.setattr(depthwise_cpu, "FEWEST_IMAGES", 0 if request.param else math.inf)
    monkeypatch.setattr(depthwise_cpu, "NATIVE_BF16", request.param)
    return request.param


# the depthwise half

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype):
    for options in OPTIONS:
        unit = make_unit(*shape, dtype, **options)
        assert not too_far(run(depthwise_cpu, unit), unit), options


@pytest.mark.parametrize("channel_major", [True], indirect=True, ids=[""])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_MAPS, ids=str)
def test_products_are_as_exact_as_plain_pytorch(channel_major, counted, shape, dtype):
    built = counted(depthwise_cpu, "toeplitz")
    for options in OPTIONS:
        unit = make_unit(*shape, dtype, **options)
        assert not too_far(run(depthwise_cpu, unit), unit), options
    assert len(built) == 2 * len(OPTIONS)


@pytest.mark.parametrize("channel_major", [True], indirect=True, ids=[""])
def test_a_block_by_products_keeps_the_layout_of_its_input(channel_major, counted):
    built = counted(depthwise_cpu, "toeplitz")
    x = make_unit(3, 2, 8, 8, 5).x
    for channel_major in (False, True):
        x = depthwise_cpu.with_layout(x, channel_major)
        y = depthwise_gelu_bn(x, torch.randn(2, 1, 5, 5))[0]
        assert y.stride() == x.stride()
    assert len(built) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_large_values(dtype):
    for fixed_stats in (False, True):
        # float16 ends at 65504
        unit = make_unit(3, 2, 8, 8, 5, dtype, scale=2000.0, fixed_stats=fixed_stats)
        assert not too_far(run(depthwise_cpu, unit), unit)
    unit = make_unit(4, 6, 8, 8, 5, dtype)
    wide = torch.randn(4, 6, 8, 16).to(dtype)
    for layout in (lambda t: t.to(memory_format=torch.channels_last),
                   lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
                   lambda t: wide[..., ::2].copy_(t)):
        other = unit._replace(x=layout(unit.x), dy=layout(unit.dy.clone()))
        assert not too_far(run(depthwise_cpu, other), other)


@pytest.mark.parametrize("implementation", [depthwise_cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=["batch", "fixed", "bare"])
def test_float64_equals_autograd(implementation, options):
    """1e-12 is some thousand roundings of float64: sums of a hundred terms in another order."""
    for shape in SHAPES:
        unit = make_unit(*shape, torch.float64, **options)
        got, want = run(implementation, unit), exact(unit)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, msg=name,
                                       atol=1e-12 * want[name].abs().max().item())


@pytest.mark.parametrize("name, fault", [
    ("weight", lambda weight: torch.cat([weight[..., :-1], 0 * weight[..., -1:]], 3)),
    ("weight", lambda weight: weight.transpose(2, 3)),
    ("dx", lambda dx: dx.flip(2, 3)),
    ("var", lambda var: var * 192 / 191),
], ids=["missing taps", "swapped offsets", "flipped dx", "n - 1 for n"])
def test_the_measure_rejects_spoilt_results(name, fault):
    unit = make_unit(3, 2, 8, 8, 5)
    assert not too_far(run(depthwise_cpu, unit), unit)
    other = unit._replace(weight=fault(unit.weight)) if name == "weight" else unit
    results = run(depthwise_cpu, other)
    assert too_far({**results, name: fault(results[name])} if name != "weight" else results, unit)


@pytest.mark.parametrize("channel_major", [True], indirect=True, ids=[""])
def test_a_wrong_matrix_is_rejected(channel_major, monkeypatch):
    toeplitz = depthwise_cpu.toeplitz
    monkeypatch.setattr(depthwise_cpu, "toeplitz", lambda *args: toeplitz(*args).roll(1, 2))
    unit = make_unit(3, 2, 8, 8, 5)
    assert too_far(run(depthwise_cpu, unit), unit)


# the dense half

def dense_unit(C, D, P, fused=False):
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Conv2d(C, D, P, P), nn.GELU(), nn.BatchNorm2d(D))
    randomise(parts, seed=1)
    if fused:
        kernels_module._become(parts, kernels_module.FusedSequential, kernel_size=9)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [True, False], ids=["", "of an image"])
@pytest.mark.parametrize("C, D, P, side", [(6, 5, 1, 8), (1, 4, 1, 4), (3, 8, 4, 16),
                                           (3, 8, 4, 18), (5, 5, 1, 9), (512, 6, 1, 8)])
def test_a_dense_unit_is_as_exact_as_its_parts(channel_major, C, D, P, side, dtype, of_x):
    """Each result has at most twice the error of the parts in the same dtype, against float64, and
    one rounding of its largest element. The errors are the largest of eight batches: a weight
    gradient of four elements is by luck three times as exact in one of them."""
    plain, fused = dense_unit(C, D, P), dense_unit(C, D, P, fused=True)
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
    fused, x = dense_unit(16, 16, 1, fused=True), torch.randn(8, 16, 8, 8)
    y, saved = saved_bytes(lambda: fused(x), x.nbytes)
    assert saved == 2 * x.nbytes
    y.sum().backward()
    assert x.grad is None and fused[0].weight.grad is not None


def test_fuse_takes_it_in_and_unfuse_gives_it_back(channel_major, counted):
    """The layers of a ConvMixer and its patch embedding, in each memory format, both orders of
    `fuse` and `.to`."""
    calls = counted(kernels_module, "dense_gelu_bn")
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


def test_a_spoilt_gradient_would_be_seen(monkeypatch):
    conv_backward = depthwise_cpu._dense_conv_backward
    monkeypatch.setattr(depthwise_cpu, "_dense_conv_backward",
                        lambda dz, x, weight, needs_dx: conv_backward(dz, x, -weight, needs_dx))
    x, dy = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    ours = results(dense_unit(4, 4, 1, fused=True), x, dy)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours[1], results(dense_unit(4, 4, 1), x, dy)[1])


def test_flops_of_a_dense_unit(channel_major):
    flops = []
    for fused in (False, True):
        with FlopCounterMode(display=False) as counter:
            dense_unit(3, 4, 2, fused)(torch.randn(5, 3, 8, 8).requires_grad_()).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_batched_gradients(channel_major):
    """As torch.autograd.functional.jacobian(vectorize=True) and is_grads_batched ask for them."""
    plain = create_model("convmixer", dim=8, depth=1, patch=4, image_size=16, kernel_size=5)
    fused, x = copy.deepcopy(plain), torch.rand(5, 3, 16, 16, requires_grad=True)
    fuse(fused)
    for a, b in [[torch.autograd.functional.jacobian(model, x, vectorize=True)
                  for model in (plain, fused)],
                 *zip(*(torch.autograd.grad(model(x), list(model.parameters()), torch.ones(3, 5, 2),
                                            is_grads_batched=True) for model in (plain, fused)),
                      strict=True)]:
        assert b.shape == a.shape
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
