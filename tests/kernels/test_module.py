"""DepthwiseGELUBN in place of its parts: the same keys, numbers and BatchNorm."""
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels import DepthwiseGELUBN, depthwise_cpu, fuse
from kernels import module as kernels_module
from kernels.depthwise_cpu import fusing_pays  # before the tests' own takes its place
from mixer.models import create_model
from mixer.models.convmixer import depthwise_unit
from tests.helpers.networks import results


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(dim=4, kernel_size=5, **bn_options):
    """(plain unit, a fused copy), scale and shift not 1 and 0."""
    plain = depthwise_unit(dim, kernel_size)
    plain[2] = nn.BatchNorm2d(dim, **bn_options)
    with torch.no_grad():
        for p in plain[2].parameters():
            p.add_(randn(p.shape, seed=p.numel()))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 1
    return plain, fused


def assert_same(plain, fused):
    """Outputs, gradients and every buffer agree over three batches. 1e-5 is a hundred roundings of
    float32."""
    for seed in range(3):
        x, dy = (randn((4, 4, 8, 8), seed=seed) for seed in (seed, 100 + seed))
        for want, got in zip(*(results(model, x, dy) for model in (plain, fused)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5,
                                       atol=1e-5 * want.abs().max().item() + 1e-7)


@pytest.mark.parametrize("bn_options", [
    {}, dict(momentum=None), dict(momentum=0.3, eps=0.01), dict(affine=False),
    dict(track_running_stats=False)], ids=str)
def test_batchnorm_behaves_as_pytorchs(bn_options):
    plain, fused = pair(**bn_options)
    assert_same(plain, fused)               # training: statistics, count
    assert_same(plain.eval(), fused.eval())
    plain.train(), fused.train()
    plain[2].eval(), fused[2].eval()        # frozen
    assert_same(plain, fused)


def test_a_biased_running_variance_would_be_seen(monkeypatch):
    plain, fused = pair()
    update = kernels_module.update_running_stats
    monkeypatch.setattr(kernels_module, "update_running_stats",
                        lambda bn, mean, var, n: update(bn, mean, var * (n - 1) / n, n))
    with pytest.raises(AssertionError):
        assert_same(plain, fused)


def test_state_dict_and_repr():
    plain, fused = depthwise_unit(4, 5), DepthwiseGELUBN(4, 5, residual=True)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(fused(x), plain(x) + x, rtol=1e-5, atol=1e-5)
    assert "residual=True" in repr(fused)
    with pytest.raises(ValueError, match="kernel_size 4 is even"):
        DepthwiseGELUBN(4, 4)


def test_one_value_a_channel_and_empty_batches():
    plain, fused = pair()
    for model in (plain, fused):
        with pytest.raises(ValueError, match="value"):
            model(torch.ones(1, 4, 1, 1))
        assert model(torch.empty(0, 4, 8, 8)).shape == (0, 4, 8, 8)
    assert torch.equal(fused[2].running_mean, torch.zeros(4))
    assert torch.equal(fused[2].running_var, torch.ones(4))


def test_fifty_steps_with_and_without():
    """One seed, the same losses to 1e-4: Adam makes 1e-6 to 1e-5 of the roundings, measured."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 8, 3, 64, 64, generator=generator)
    y = torch.randint(0, 4, (50, 8), generator=generator)
    losses = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = create_model("convmixer", dim=32, depth=2, kernel_size=9, patch=8, image_size=64,
                             num_classes=4)
        assert not fused or fuse(model) == 2
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for images, labels in zip(x, y, strict=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size, N, training, avx512, fused", [
    (9, 32, True, True, True), (5, 32, True, True, True), (9, 32, True, False, True),
    (3, 32, True, True, False), (9, 1, True, True, False), (9, 32, False, True, False),
    (3, 32, False, False, "16 bits")])
def test_the_parts_run_where_they_are_faster(monkeypatch, dtype, kernel_size, N, training, avx512,
                                             fused, counted):
    """On a CPU: without a gradient, for 3x3 kernels, and for a few images, but not where PyTorch's
    conv of 16 bits is slow. The same model, in one call or another."""
    monkeypatch.setattr(depthwise_cpu, "fusing_pays", fusing_pays)
    monkeypatch.setattr(kernels_module, "FEWEST_OUTPUTS", 100_000)
    monkeypatch.setattr(depthwise_cpu, "AVX512", avx512)
    ran = counted(kernels_module, "depthwise_gelu_bn", "dense_gelu_bn")
    model = create_model("convmixer", patch=4, dim=32, depth=1, kernel_size=kernel_size,
                         image_size=64)
    fuse(model)
    model.train(training)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype,
                                                          enabled=dtype == torch.bfloat16):
        model(torch.rand(N, 3, 64, 64))
    fused = dtype == torch.bfloat16 if fused == "16 bits" else fused
    assert ran == (["dense_gelu_bn", "depthwise_gelu_bn", "dense_gelu_bn"] if fused else [])


def test_its_output_may_change_in_place_and_a_slice_is_plain():
    (plain, fused), x = pair(), randn((4, 4, 8, 8), seed=0)
    y = fused(x).relu_()
    y.sum().backward()
    torch.testing.assert_close(y, plain(x).relu(), rtol=1e-5, atol=1e-5)
    assert type(fused[:2]) is nn.Sequential and torch.equal(fused[:2](x), plain[:2](x))
