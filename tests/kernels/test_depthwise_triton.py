"""The Triton kernels against float64: on a GPU, or without one in Triton's interpreter."""
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.units import DEVICE, make_unit, run, too_far

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from kernels import depthwise_launch, depthwise_triton

INTERPRETED = DEVICE == "cpu"
SWITCHED = isinstance(depthwise_triton._gelu, triton.runtime.interpreter.InterpretedFunction)
pytestmark = [
    pytest.mark.skipif(INTERPRETED and not SWITCHED, reason="without a GPU, TRITON_INTERPRET=1 "
                                                            "must precede the import of Triton"),
    pytest.mark.usefixtures("poisoned"),
]
# N, C, H, W, K: the four map sizes of the design, odd ones, one of everything; odd N
SHAPES = [(3, 2, 8, 8, 9), (5, 1, 12, 12, 9), (2, 1, 16, 16, 9), (1, 1, 32, 32, 9), (3, 1, 8, 8, 3),
          (2, 1, 12, 12, 11), (3, 1, 16, 16, 5), (1, 1, 32, 32, 7), (3, 2, 7, 5, 3),
          (2, 1, 5, 9, 11), (2, 1, 14, 14, 7), (4, 3, 3, 3, 1), (2, 2, 1, 6, 5)]
SAMPLED = [(3, 2, 8, 8, 9), (5, 1, 12, 12, 9), (3, 2, 7, 5, 3)]  # a whole map, tiles, an odd map
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launched(programs):
    """The launchers, with this many programs per channel. One program: one launch each way."""
    return SimpleNamespace(forward=partial(depthwise_launch.forward, programs=programs),
                           backward=partial(depthwise_launch.backward, programs=programs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype):
    unit = make_unit(*shape, dtype, device=DEVICE)
    assert not too_far(run(launched(1), unit), unit)


@pytest.mark.parametrize("shape", [
    shape if shape in SAMPLED else pytest.param(shape, marks=pytest.mark.campaign)
    for shape in SHAPES], ids=str)
def test_two_launches_fixed_statistics_and_no_parameters_are_as_exact(shape):
    for programs, options in ((2, {}), (1, dict(fixed_stats=True, residual=False)),
                              (3, dict(bare=True))):
        unit = make_unit(*shape, **options, device=DEVICE)
        assert not too_far(run(launched(programs), unit), unit), (programs, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_and_offsets(dtype):
    """float16 ends at 65504. A variance taken as E[g^2] - E[g]^2 loses its digits if the mean is
    far from 0."""
    for fixed_stats in (False, True):
        unit = make_unit(3, 2, 8, 8, 5, dtype, scale=2000.0, fixed_stats=fixed_stats, device=DEVICE)
        if dtype != torch.float32:
            assert unit.x.abs().max() > 5000 and not too_far(run(launched(1), unit), unit)
    unit = make_unit(4, 2, 8, 8, 5, dtype, device=DEVICE)
    unit = unit._replace(bias=unit.bias + 1000.0)
    for programs in (1, 2):
        problems = too_far(run(launched(programs), unit), unit)
        assert not [problem for problem in problems if problem.startswith(("mean", "var"))]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_channels_that_hardly_vary_and_parameters_with_strides(dtype):
    """y must be normalised with the moments of the g that is stored."""
    for programs, fixed_stats in ((1, False), (2, False), (1, True)):
        unit = make_unit(3, 4, 8, 8, 9, dtype, residual=False, scale=1e-3, device=DEVICE,
                         fixed_stats=fixed_stats)
        unit = unit.map(lambda t: t.repeat_interleave(2, 0)[::2])
        assert not too_far(run(launched(programs), unit), unit), (programs, fixed_stats)


@triton.jit
def _gelu_kernel(z_ptr, gelu_ptr, slope_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i)
    tl.store(gelu_ptr + i, depthwise_triton._gelu(z, z_ptr))
    tl.store(slope_ptr + i, depthwise_triton._gelu_slope(z))


def test_gelu_and_its_slope_are_as_exact_as_with_erf():
    """In float32, against float64, tails too: each in terms of the form with PyTorch's erf."""
    z = torch.cat([torch.linspace(-14, 14, 2**15 - 8),
                   torch.tensor([0.0, -0.0, 1e-30, -60.0, 65504.0, -65504.0, 1e10, -1e10])])
    z = z.to(DEVICE).requires_grad_()
    gelu, slope = (torch.full_like(z, float("nan")) for _ in range(2))
    _gelu_kernel[(1,)](z.detach(), gelu, slope, len(z))

    def by_erf(z):
        gelu = torch.nn.functional.gelu(z)
        return gelu.detach(), torch.autograd.grad(gelu.sum(), z)[0]
    exact = by_erf(z.detach().double().requires_grad_())
    for ours, plain, want in zip((gelu, slope), by_erf(z), exact, strict=True):
        ours, plain = ((t.double() - want).abs() for t in (ours, plain))
        assert ours.max() <= plain.max() + 1e-7
        assert (ours / want.abs().clamp(min=1)).max() <= 3e-7
        tail = (z < -3) & (z > -4)
        assert (ours / want.abs())[tail].max() <= 2 * (plain / want.abs())[tail].max()


def every_second_column(t):
    wide = torch.empty(*t.shape[:3], 2 * t.shape[3], dtype=t.dtype, device=t.device)
    return wide[..., ::2].copy_(t)


def some_channels(t):
    more = torch.empty(t.shape[0], 9, *t.shape[2:], dtype=t.dtype, device=t.device)
    return more[:, 2:5].copy_(t)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "channel-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": every_second_column,
    "some channels": some_channels,
    "transposed maps": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    unit = make_unit(4, 3, 4, 4, 3, device=DEVICE)
    other = unit._replace(x=LAYOUTS[layout](unit.x))
    assert other.x.stride() != unit.x.stride()
    for dy in (unit.dy, LAYOUTS[layout](unit.dy), unit.dy[:1, :1, :1, :1].expand_as(unit.dy)):
        assert not too_far(run(launched(1), other._replace(dy=dy)), other._replace(dy=dy))


def test_same_input_same_bits():
    unit = make_unit(5, 1, 12, 12, 9, torch.float16, device=DEVICE)
    for programs in (1, 2):
        first, second = (run(launched(programs), unit) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_tiles_cover_what_the_design_names():
    why_not_launchable = partial(depthwise_launch.why_not_launchable, torch.device("cpu"))
    for side, K, dtype in itertools.product((8, 12, 16, 32), (3, 5, 7, 9, 11), DTYPES):
        assert why_not_launchable((250, 512, side, side), K, dtype) is None
    for shape, K, dtype in (((2, 2, 8, 8), 3, torch.float64), ((2, 2, 8, 8), 13, torch.float32),
                            ((2, 2, 112, 112), 3, torch.float32),
                            ((2, 2**25, 8, 8), 3, torch.float32)):
        assert "no Triton kernel takes" in why_not_launchable(shape, K, dtype)


def test_the_originals_shapes_take_one_program_per_channel():
    programs_per_channel = depthwise_launch.programs_per_channel
    assert programs_per_channel((250, 512, 8, 8), torch.float16) == 1
    assert programs_per_channel((250, 512, 12, 12), torch.float16) == 1
    assert programs_per_channel((64, 768, 32, 32), torch.float16) > 1


def test_float32_products_follow_cudnns_switch(monkeypatch):
    def precision():
        limits = depthwise_launch.limits_of(torch.device("cpu"))
        tiling, _ = depthwise_launch.choose_tiling(8, 8, 3, torch.float32, False, limits)
        return tiling.PRECISION
    assert precision() == "tf32x3"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert precision() == "tf32"


def why_not_trusted():
    return depthwise_launch.why_not_trusted(torch.device(DEVICE))


def test_the_check_before_the_first_use(monkeypatch):
    """It passes, and names a NaN, a wrong tensor, a kernel of two launches, and one that fails."""
    assert why_not_trusted() is None
    backward, merge = depthwise_launch.backward, depthwise_launch.merge_moments

    def fail(*args, **options):
        raise RuntimeError("out of resource\nsecond line")
    for name, fault, reason in [
            ("backward", lambda *args, **options: [
                t * float("nan") for t in backward(*args, **options)], "error nan"),
            ("backward", lambda *args, **options: [
                *backward(*args, **options)[:4], torch.zeros(4, device=DEVICE)], "error 1"),
            ("merge_moments", lambda mean, *rest: merge(mean + 1, *rest), "wrong on this GPU"),
            ("forward", fail, "fail on this GPU: RuntimeError: out of resource")]:
        with monkeypatch.context() as patch:
            patch.setattr(depthwise_launch, name, fault)
            assert why_not_trusted().endswith(reason) or reason == "wrong on this GPU"


@triton.jit
def _tanh_gelu(z, x_ptr):
    return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _toeplitz_without_a_tap(w_ptr, first, FLIPPED: tl.constexpr, META: tl.constexpr):
    i, o = first + tl.arange(0, META.BLOCK_IN)[:, None], tl.arange(0, META.BLOCK_OUT)[None, :]
    ky = i // META.W - o // META.W + (META.K // 2 - META.HALO)
    kx = i % META.W - o % META.W + META.K // 2
    tap = META.K * META.K - 1 - (ky * META.K + kx) if FLIPPED else ky * META.K + kx
    inside = (ky >= 0) & (ky < META.K) & (kx >= 0) & (kx < META.K - 1)
    inside = inside & (i < (META.TILE_H + 2 * META.HALO) * META.W) & (o < META.TILE_H * META.W)
    return tl.load(w_ptr + tap, mask=inside, other=0.0)


@triton.jit
def _slope_of_relu(z):
    return tl.where(z > 0, 1.0, 0.0)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps its functions")
@pytest.mark.parametrize("name, fault", [
    ("_gelu", _tanh_gelu), ("_toeplitz", _toeplitz_without_a_tap), ("_gelu_slope", _slope_of_relu)])
def test_spoilt_kernels_are_rejected(monkeypatch, name, fault):
    monkeypatch.setattr(depthwise_triton, name, fault)
    unit = make_unit(3, 1, 8, 8, 5)
    assert too_far(run(launched(1), unit), unit)
    if fault is not _tanh_gelu:  # 1e-3 off, which float16 hides: the float32 tests are for that
        assert "wrong on this GPU" in why_not_trusted()
