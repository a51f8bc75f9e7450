"""The Triton kernels against float64: on a GPU, or where there is none in Triton's interpreter."""
import pytest
import torch
from tests.helpers.blocks import make_block, run, too_far
from tests.conftest import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from kernels import depthwise_launch, depthwise_triton

INTERPRETED = DEVICE == "cpu"
on_this_device = pytest.mark.skipif(INTERPRETED and not isinstance(depthwise_triton._gelu, triton.runtime.interpreter.InterpretedFunction),
                                    reason="without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported")
pytestmark = [on_this_device, pytest.mark.usefixtures("poisoned")]
# N, C, H, W, K: the four map sizes of the design, odd ones, one of everything; odd N
SHAPES = [(3, 2, 8, 8, 9), (5, 2, 12, 12, 9), (2, 1, 16, 16, 9), (1, 2, 32, 32, 9), (3, 2, 8, 8, 3), (2, 1, 12, 12, 11), (3, 1, 16, 16, 5),
          (1, 1, 32, 32, 7), (3, 2, 7, 5, 3), (2, 2, 5, 9, 11), (2, 1, 14, 14, 7), (4, 3, 3, 3, 1), (2, 2, 1, 6, 5)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ways(programs):
    """The launchers, over this many programs a channel."""
    class Ways:
        @staticmethod
        def forward(*args):
            return depthwise_launch.forward(*args, plan=plan)

        @staticmethod
        def backward(*args):
            return depthwise_launch.backward(*args, plan=plan)

    def plan(shape, kernel_size, dtype):
        cut, options, _ = depthwise_launch.plan(shape, kernel_size, dtype)
        return cut, options, min(programs, shape[0])
    return Ways


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype):
    more = ((2, {}), (1, dict(given=True, residual=False)), (3, dict(bare=True))) if dtype == torch.float32 else ()
    for programs, options in ((1, {}), *more):
        block = make_block(*shape, dtype, **options, device=DEVICE)
        assert not too_far(run(ways(programs), block), block), (programs, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_and_offsets(dtype):
    """float16 ends at 65504; a mean far from 0 is where a variance taken as E[g^2] - E[g]^2 loses its digits."""
    for options in (dict(scale=2000.0), dict(scale=2000.0, given=True)):
        block = make_block(3, 2, 8, 8, 5, dtype, **options, device=DEVICE)
        if dtype != torch.float32:
            assert block.x.abs().max() > 5000 and not too_far(run(ways(1), block), block)
    block = make_block(4, 2, 8, 8, 5, dtype, device=DEVICE)
    block = block._replace(bias=block.bias + 1000.0)
    for programs in (1, 2):
        wrong = too_far(run(ways(programs), block), block)
        assert not [line for line in wrong if line.startswith(("mean", "var"))]


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "channel-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": lambda t: torch.empty(*t.shape[:3], 2 * t.shape[3], dtype=t.dtype, device=t.device)[..., ::2].copy_(t),
    "some channels": lambda t: torch.empty(t.shape[0], 9, *t.shape[2:], dtype=t.dtype, device=t.device)[:, 2:5].copy_(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    block = make_block(4, 3, 8, 8, 5, device=DEVICE)
    other = block._replace(x=LAYOUTS[layout](block.x))
    assert other.x.stride() != block.x.stride()
    for dy in (block.dy, LAYOUTS[layout](block.dy), block.dy[:1, :1, :1, :1].expand_as(block.dy)):
        results = run(ways(1), other._replace(dy=dy))
        assert not too_far(results, other._replace(dy=dy))
        assert results["y"].stride() == results["dx"].stride() == torch.empty_like(other.x).stride()


def test_channel_major_is_not_copied():
    x = LAYOUTS["channel-major"](torch.empty(4, 3, 8, 8))
    assert depthwise_launch._strided(x) is x


def test_same_input_same_bits():
    block = make_block(5, 2, 12, 12, 9, torch.float16, device=DEVICE)
    for programs in (1, 2):
        first, second = run(ways(programs), block), run(ways(programs), block)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_plans_cover_what_the_design_names():
    for side in (8, 12, 16, 32):
        for K in (3, 5, 7, 9, 11):
            for dtype in DTYPES:
                assert depthwise_launch.unsupported((250, 512, side, side), K, dtype) is None
    assert depthwise_launch.plan((250, 512, 8, 8), 9, torch.float16)[2] == 1  # the original's shapes take one launch
    assert depthwise_launch.plan((250, 512, 12, 12), 9, torch.float16)[2] == 1
    assert depthwise_launch.plan((64, 768, 32, 32), 7, torch.float16)[2] > 1
    assert "float64" in depthwise_launch.unsupported((2, 2, 8, 8), 3, torch.float64)
    assert "up to 11" in depthwise_launch.unsupported((2, 2, 8, 8), 13, torch.float32)
    assert "too wide" in depthwise_launch.unsupported((2, 2, 112, 112), 3, torch.float32)


def test_float32_products_follow_cudnns_switch(monkeypatch):
    shape = 2, 2, 8, 8
    assert depthwise_launch.plan(shape, 3, torch.float32)[0].PRECISION == "tf32x3"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert depthwise_launch.plan(shape, 3, torch.float32)[0].PRECISION == "tf32"


def test_nothing_is_found_wrong_here():
    assert depthwise_launch.fails_here(torch.device(DEVICE)) is None


def test_a_nan_is_found_wrong(monkeypatch):
    backward = depthwise_launch.backward
    monkeypatch.setattr(depthwise_launch, "backward", lambda *args, **options: [t * float("nan") for t in backward(*args, **options)])
    assert "wrong on this GPU" in depthwise_launch.fails_here(torch.device(DEVICE))


def test_kernels_of_several_launches_are_looked_at_too(monkeypatch):
    merged = depthwise_launch.merged
    monkeypatch.setattr(depthwise_launch, "merged", lambda count, mean, m2: merged(count, mean + 1, m2))
    assert "wrong on this GPU" in depthwise_launch.fails_here(torch.device(DEVICE))


@triton.jit
def _tanh_gelu(z):
    return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _toeplitz_without_a_tap(w_ptr, first, TURNED: tl.constexpr, P: tl.constexpr):
    i, o = first + tl.arange(0, P.BLOCK_IN)[:, None], tl.arange(0, P.BLOCK_OUT)[None, :]
    dy, dx = i // P.W - o // P.W + (P.K // 2 - P.HALO), i % P.W - o % P.W + P.K // 2
    tap = P.K * P.K - 1 - (dy * P.K + dx) if TURNED else dy * P.K + dx
    inside = (dy >= 0) & (dy < P.K) & (dx >= 0) & (dx < P.K - 1) & (i < (P.ROWS + 2 * P.HALO) * P.W) & (o < P.ROWS * P.W)
    return tl.load(w_ptr + tap, mask=inside, other=0.0)


@triton.jit
def _toeplitz_with_swapped_offsets(w_ptr, first, TURNED: tl.constexpr, P: tl.constexpr):
    i, o = first + tl.arange(0, P.BLOCK_IN)[:, None], tl.arange(0, P.BLOCK_OUT)[None, :]
    dx, dy = i // P.W - o // P.W + (P.K // 2 - P.HALO), i % P.W - o % P.W + P.K // 2
    tap = P.K * P.K - 1 - (dy * P.K + dx) if TURNED else dy * P.K + dx
    inside = (dy >= 0) & (dy < P.K) & (dx >= 0) & (dx < P.K) & (i < (P.ROWS + 2 * P.HALO) * P.W) & (o < P.ROWS * P.W)
    return tl.load(w_ptr + tap, mask=inside, other=0.0)


@triton.jit
def _slope_of_relu(z):
    return tl.where(z > 0, 1.0, 0.0)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps the functions that it was compiled with")
@pytest.mark.parametrize("name, fault", [("_gelu", _tanh_gelu), ("_toeplitz", _toeplitz_without_a_tap),
                                         ("_toeplitz", _toeplitz_with_swapped_offsets), ("_gelu_slope", _slope_of_relu)])
def test_spoilt_kernels_are_rejected(monkeypatch, name, fault):
    monkeypatch.setattr(depthwise_triton, name, fault)
    block = make_block(3, 2, 8, 8, 5)
    assert too_far(run(ways(1), block), block)
    if fault is not _tanh_gelu:  # 1e-3 off, which float16 hides: the float32 tests are for that
        assert "wrong on this GPU" in depthwise_launch.fails_here(torch.device(DEVICE))
