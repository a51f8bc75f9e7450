"""DepthwiseGELUBN as a drop-in: the same keys, the same numbers, the same BatchNorm, in any model that has the parts."""
import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tests.models.test_convmixer import authors_convmixer

from kernels import DepthwiseGELUBN, fuse, unfuse
from kernels import module as kernels_module
from mixer.models import load_weights
from mixer.models import create_model
from mixer.models.convmixer import Residual, depthwise_unit


def pair(dim=4, kernel_size=5, **bn_options):
    """(plain unit, DepthwiseGELUBN with its own copy of the same weights), scale and shift not 1 and 0."""
    plain = depthwise_unit(dim, kernel_size)
    plain[2] = nn.BatchNorm2d(dim, **bn_options)
    with torch.no_grad():
        for p in plain[2].parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return plain, DepthwiseGELUBN.of_parts(*copy.deepcopy(plain))


def assert_same(plain, fused, batches=3, shape=(4, 4, 8, 8)):
    """Outputs, gradients and every buffer agree over some batches; 1e-5 is a hundred roundings of float32."""
    for seed in range(batches):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
        results = []
        for model in (plain, fused):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.backward(dy)
            results.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for want, got in zip(*results, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item() + 1e-7)


@pytest.mark.parametrize("bn_options", [{}, dict(momentum=None), dict(momentum=0.3, eps=0.01), dict(affine=False),
                                        dict(track_running_stats=False)], ids=str)
def test_batchnorm_behaves_as_pytorchs(bn_options):
    plain, fused = pair(**bn_options)
    assert_same(plain, fused)               # training: statistics, count
    assert_same(plain.eval(), fused.eval())
    plain.train(), fused.train()
    plain[2].eval(), fused[2].eval()        # frozen
    assert_same(plain, fused)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_parameters_without_gradient(frozen):
    plain, fused = pair()
    for model in (plain, fused):
        model.get_parameter(frozen).requires_grad_(False)
    assert_same(plain, fused)


def test_a_biased_running_variance_would_be_seen(monkeypatch):
    plain, fused = pair()
    update = kernels_module.update_running_stats
    monkeypatch.setattr(kernels_module, "update_running_stats", lambda bn, mean, var, n: update(bn, mean, var * (n - 1) / n, n))
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
    assert torch.equal(fused[2].running_mean, torch.zeros(4)) and torch.equal(fused[2].running_var, torch.ones(4))


def timm_convmixer():
    convmixer = pytest.importorskip("timm.models.convmixer", reason="timm is a peer here: pip install timm")
    return convmixer.ConvMixer(dim=16, depth=3, kernel_size=5, patch_size=8, num_classes=4)


class OwnResidual(nn.Module):
    """Adds its input, under a name of its own."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return x + self.inside(x)


class Half(OwnResidual):
    def forward(self, x):
        return self.inside(x) * 0.5 + x


MODELS = {
    "ours": lambda: create_model("convmixer", dim=16, depth=3, kernel_size=5, patch=8, image_size=64, num_classes=4),
    "timm's": timm_convmixer,
    "the authors'": lambda: authors_convmixer(16, 3, 5, 8, 4),
    "without residual": lambda: nn.Sequential(nn.Conv2d(3, 16, 8, 8), *[depthwise_unit(16, 5) for _ in range(3)]),
    "another residual": lambda: nn.Sequential(nn.Conv2d(3, 16, 8, 8), *[OwnResidual(depthwise_unit(16, 5)) for _ in range(3)]),
    "half a residual": lambda: nn.Sequential(nn.Conv2d(3, 16, 8, 8), *[Half(depthwise_unit(16, 5)) for _ in range(3)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_fuse_and_unfuse(name):
    torch.manual_seed(0)
    plain = MODELS[name]()
    fused = copy.deepcopy(plain)
    tensors = {key: t.data_ptr() for key, t in fused.state_dict(keep_vars=True).items()}
    before = repr(fused)
    assert fuse(fused) == 3
    blocks = [m for m in fused.modules() if isinstance(m, DepthwiseGELUBN)]
    assert len(blocks) == 3 and all(block.residual == (name not in ("without residual", "half a residual")) for block in blocks)
    assert {key: t.data_ptr() for key, t in fused.state_dict(keep_vars=True).items()} == tensors
    x = torch.rand(4, 3, 64, 64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    clone = copy.deepcopy(fused)
    torch.testing.assert_close(clone(x), fused(x))
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse(fused)
    for model in (fused, clone):
        assert unfuse(model) == 3 and repr(model) == before and not any(m.training for m in model.modules())
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert unfuse(fused) == 0 and fuse(fused) == 3


def test_flags_hooks_and_other_parts():
    def unit(**changes):
        parts = dict(conv=nn.Conv2d(8, 8, 5, groups=8, padding=2), act=nn.GELU(), bn=nn.BatchNorm2d(8))
        return nn.Sequential(*{**parts, **changes}.values())
    others = [unit(act=nn.ReLU()), unit(act=nn.GELU("tanh")), unit(conv=nn.Conv2d(8, 8, 5, groups=4, padding=2)),
              unit(conv=nn.Conv2d(8, 8, 5, groups=8, padding=1)), unit(conv=nn.Conv2d(8, 8, 5, 2, groups=8, padding=2)),
              unit(conv=nn.Conv2d(8, 8, 5, groups=8, padding=2, padding_mode="circular")),
              unit(bn=nn.SyncBatchNorm(8, process_group=object())),
              unit(conv=nn.Conv2d(8, 8, (5, 3), groups=8, padding=(2, 1))), unit(conv=nn.Conv2d(8, 8, 4, groups=8, padding=2)),
              unit(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 5, groups=8, padding=2)))]
    hooked = [unit() for _ in range(3)]
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[1][1].register_forward_pre_hook(lambda *_: None)
    hooked[2][0].register_full_backward_hook(lambda *_: None)
    wrapper = Residual(unit())
    wrapper.register_forward_hook(lambda *_: None)
    for module in (*others, *hooked):
        with pytest.raises(ValueError, match="nothing to fuse"):
            fuse(nn.Sequential(module))
    model = nn.Sequential(wrapper, unit(), *others, *hooked)
    model[1].eval()
    model[0].fn[2].eval()
    shared = model[1]
    model.append(shared)
    assert fuse(model) == 2  # the unit within the hooked wrapper, and the one that stands in two places
    assert type(model[0]) is Residual and isinstance(model[0].fn, DepthwiseGELUBN) and not model[0].fn.residual
    assert model[1] is model[-1] and not model[1].training and not model[1][0].training
    assert model[0].fn.training and not model[0].fn[2].training


def test_parts_exchanged_afterwards(recwarn, monkeypatch):
    """PyTorch's SyncBatchNorm is taken as it is, and in one process it is BatchNorm; one over some of the processes is not."""
    kernels_module.warn_once.cache_clear()
    calls, fused_op = [], kernels_module.depthwise_gelu_bn
    monkeypatch.setattr(kernels_module, "depthwise_gelu_bn", lambda *args, **options: calls.append(1) or fused_op(*args, **options))
    model = MODELS["ours"]()
    fuse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    blocks = [m for m in model.modules() if isinstance(m, DepthwiseGELUBN)]
    assert len(blocks) == 3 and all(type(block[2]) is nn.SyncBatchNorm for block in blocks)
    x = torch.rand(4, 3, 64, 64)
    model.eval()
    y = model(x)
    assert len(calls) == 3 and not recwarn.list
    seen = []
    for block in blocks:
        block[2].process_group = object()
        block[2].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        torch.testing.assert_close(model(x), y)
    assert len(calls) == 3 and len(seen) == 6 and ["a hook on SyncBatchNorm" in str(w.message) for w in recwarn.list] == [True]
    for block in blocks:
        block[2]._forward_hooks.clear()
    model(x)
    assert len(calls) == 3 and "process group of its own" in str(recwarn.list[-1].message)
    assert unfuse(model) == 3 and type(model.blocks[0][0].fn[2]) is nn.SyncBatchNorm
    torch.testing.assert_close(model(x), y)


def test_fifty_steps_with_and_without(tmp_path):
    """One seed, the same losses to 1e-4 (rounding, grown by 50 Adam steps: 1e-6 to 1e-5 measured), and one checkpoint fits both."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, 8, 3, 64, 64, generator=generator), torch.randint(0, 4, (50, 8), generator=generator)
    losses, models = [], []
    for fused in (False, True):
        torch.manual_seed(1)
        model = create_model("convmixer", dim=32, depth=2, kernel_size=9, patch=8, image_size=64, num_classes=4,
                             depthwise=DepthwiseGELUBN if fused else None)
        if fused:
            assert sum(isinstance(m, DepthwiseGELUBN) for m in model.modules()) == 2
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for images, labels in zip(x, y):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        models.append(model.eval())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert losses[0][-1] != losses[0][0]
    torch.save(models[0].state_dict(), tmp_path / "plain.pt")
    load_weights(models[1], torch.load(tmp_path / "plain.pt", weights_only=True))
    torch.testing.assert_close(models[1](x[0]), models[0](x[0]), rtol=1e-5, atol=1e-5)


def test_compiled_whole_and_under_ddp(tmp_path):
    plain, fused = (MODELS["ours"]() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    x = torch.rand(4, 3, 64, 64)
    want = plain(x)
    torch.testing.assert_close(torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")(x), want, rtol=1e-4, atol=1e-5)
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(fused)
        ddp(x).square().sum().backward()
        want.square().sum().backward()
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item() + 1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_create_model_takes_it_for_convmixer_alone():
    with pytest.raises(ValueError, match="resnet18 has no depthwise unit"):
        create_model("resnet18", depthwise=DepthwiseGELUBN)
