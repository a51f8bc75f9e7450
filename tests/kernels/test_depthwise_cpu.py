"""The CPU's implementation and the reference against float64."""
import pytest
import torch

from kernels import depthwise_cpu, depthwise_gelu_bn, reference
from tests.helpers.blocks import exact, make_block, run, too_far

# N, C, H, W, K
SHAPES = [(3, 2, 8, 8, 9), (5, 2, 12, 12, 9), (2, 3, 16, 16, 7), (1, 2, 32, 32, 3), (3, 1, 7, 5, 3),
          (2, 2, 5, 9, 11), (4, 3, 3, 3, 1), (2, 2, 1, 6, 5)]
SMALL_MAPS = [shape for shape in SHAPES if shape[1] > 1 and shape[2] * shape[3] <= 64]
OPTIONS = [{}, dict(fixed_stats=True, residual=False), dict(bare=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype):
    for options in OPTIONS:
        block = make_block(*shape, dtype, **options)
        assert not too_far(run(depthwise_cpu, block), block), options


@pytest.fixture
def by_products(monkeypatch):
    """Small maps of any batch as products, bfloat16 as on a CPU that has products of it."""
    monkeypatch.setattr(depthwise_cpu, "IMAGES_PER_ELEMENT", {})
    monkeypatch.setattr(depthwise_cpu, "FEWEST_IMAGES", 0)
    monkeypatch.setattr(depthwise_cpu, "NATIVE_BF16", True)
    calls, forward = [], depthwise_cpu.ByProducts.__call__

    def counted(*args):
        calls.append(1)
        return forward(*args)
    monkeypatch.setattr(depthwise_cpu.ByProducts, "__call__", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SMALL_MAPS, ids=str)
def test_products_are_as_exact_as_plain_pytorch(by_products, shape, dtype):
    for options in OPTIONS:
        block = make_block(*shape, dtype, **options)
        assert not too_far(run(depthwise_cpu, block), block), options
    assert len(by_products) == 2 * len(OPTIONS)


def test_a_block_by_products_keeps_the_layout_of_its_input(by_products):
    x = make_block(3, 2, 8, 8, 5).x
    for channel_major in (False, True):
        x = depthwise_cpu.laid_out(x, channel_major)
        y = depthwise_gelu_bn(x, torch.randn(2, 1, 5, 5))[0]
        assert y.stride() == x.stride()
    assert len(by_products) == 2


def test_a_wrong_matrix_is_rejected(by_products, monkeypatch):
    build = depthwise_cpu.ByProducts.__init__

    def shifted(self, *args):
        build(self, *args)
        self.T = self.T.roll(1, 2)

    block = make_block(3, 2, 8, 8, 5)
    assert not too_far(run(depthwise_cpu, block), block)
    monkeypatch.setattr(depthwise_cpu.ByProducts, "__init__", shifted)
    assert too_far(run(depthwise_cpu, block), block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_layouts_and_large_values(dtype):
    for fixed_stats in (False, True):
        # float16 ends at 65504
        block = make_block(3, 2, 8, 8, 5, dtype, scale=2000.0, fixed_stats=fixed_stats)
        assert not too_far(run(depthwise_cpu, block), block)
    block = make_block(4, 6, 8, 8, 5, dtype)
    wide = torch.randn(4, 6, 8, 16).to(dtype)
    for layout in (lambda t: t.to(memory_format=torch.channels_last),
                   lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
                   lambda t: wide[..., ::2].copy_(t)):
        other = block._replace(x=layout(block.x), dy=layout(block.dy.clone()))
        assert not too_far(run(depthwise_cpu, other), other)


@pytest.mark.parametrize("implementation", [depthwise_cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=["batch", "fixed", "bare"])
def test_float64_equals_autograd(implementation, options):
    """1e-12 is some thousand roundings of float64: sums of a hundred terms in another order."""
    for shape in SHAPES:
        block = make_block(*shape, torch.float64, **options)
        got, want = run(implementation, block), exact(block)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, msg=name,
                                       atol=1e-12 * want[name].abs().max().item())


@pytest.mark.parametrize("name, fault", [
    ("weight", lambda weight: torch.cat([weight[..., :-1], 0 * weight[..., -1:]], 3)),
    ("weight", lambda weight: weight.transpose(2, 3)),
    ("dx", lambda dx: dx.flip(2, 3)),
    ("var", lambda var: var * 192 / 191),
], ids=["missing taps", "swapped offsets", "turned dx", "n - 1 for n"])
def test_the_measure_rejects_spoilt_results(name, fault):
    block = make_block(3, 2, 8, 8, 5)
    assert not too_far(run(depthwise_cpu, block), block)
    other = block._replace(weight=fault(block.weight)) if name == "weight" else block
    results = run(depthwise_cpu, other)
    assert too_far({**results, name: fault(results[name])} if name != "weight" else results, block)
