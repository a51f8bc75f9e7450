"""`fuse` finds the block in any model and takes it in; `unfuse` gives the model back."""
import copy
import functools
import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse, unfuse
from mixer.models import create_model
from mixer.models.convmixer import Residual, depthwise_unit
from tests.helpers.networks import authors_convmixer
from tests.helpers.ranks import group_of_one


def timm_convmixer():
    convmixer = pytest.importorskip("timm.models.convmixer", reason="needs timm: pip install timm")
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


def three(wrapper=lambda unit: unit):
    """A patch embedding and three wrapped units."""
    units = [wrapper(depthwise_unit(16, 5)) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), *units)


MODELS = {
    "ours": lambda: create_model("convmixer", dim=16, depth=3, kernel_size=5, patch=8,
                                 image_size=64, num_classes=4),
    "timm's": timm_convmixer,
    "the authors'": lambda: authors_convmixer(16, 3, 5, 8, 4),
    "without residual": three,
    "another residual": lambda: three(OwnResidual),
    "half a residual": lambda: three(Half),
}


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, DepthwiseGELUBN)]


@pytest.mark.parametrize("name", MODELS)
def test_fuse_and_unfuse(name):
    torch.manual_seed(0)
    plain = MODELS[name]()
    fused = copy.deepcopy(plain)
    tensors = {key: t.data_ptr() for key, t in fused.state_dict(keep_vars=True).items()}
    before = repr(fused)
    assert fuse(fused) == 3
    blocks = blocks_of(fused)
    residual = name not in ("without residual", "half a residual")
    assert [block.residual for block in blocks] == [residual] * 3
    assert {key: t.data_ptr() for key, t in fused.state_dict(keep_vars=True).items()} == tensors
    x = torch.rand(4, 3, 64, 64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    clone = copy.deepcopy(fused)
    torch.testing.assert_close(clone(x), fused(x))
    with pytest.raises(ValueError, match=r"nothing to fuse .*\(3 fused already\)"):
        fuse(fused)
    for model in (fused, clone):
        assert unfuse(model) == 3 and repr(model) == before
        assert not any(m.training for m in model.modules())
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert unfuse(fused) == 0 and fuse(fused) == 3


class Scaled(OwnResidual):
    def forward(self, x):
        return self.inside(x) * 2 + x


class InTraining(OwnResidual):
    def forward(self, x):
        return self.inside(x) + x if self.training else x


class AnotherArgument(OwnResidual):
    def forward(self, x, mask=None):
        return self.inside(x) + x


class AtRandom(OwnResidual):
    def forward(self, x):
        return self.inside(x) + x if random.random() < 0.9 else x


class Wrapped(OwnResidual):
    @functools.wraps(OwnResidual.forward)
    def forward(self, x):
        return 3 * OwnResidual.forward(self, x)


class WithParameter(OwnResidual):
    def __init__(self, inside):
        super().__init__(inside)
        self.gain = nn.Parameter(torch.ones(1))


Typed = type("Typed", (OwnResidual,), {"forward": eval("lambda self, x: self.inside(x) + x")})


@pytest.mark.parametrize("wrapper", [Half, Scaled, InTraining, AnotherArgument, AtRandom, Wrapped,
                                     WithParameter, Typed])
def test_only_a_plain_residual_is_taken_in(wrapper):
    """Also one that does something else at random, by a decorator, or where nobody can read it."""
    model, x = nn.Sequential(wrapper(depthwise_unit(8, 5))), torch.rand(2, 8, 6, 6)
    random.seed(1)  # both keep the branch
    want = [copy.deepcopy(model).train(training)(x) for training in (True, False)]
    keys = list(model.state_dict())
    assert fuse(model) == 1 and type(model[0]) is wrapper and not blocks_of(model)[0].residual
    assert list(model.state_dict()) == keys
    random.seed(1)
    for training, y in zip((True, False), want, strict=True):
        model.train(training)
        torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-5, atol=1e-5)


def test_names_and_modules_are_given_back():
    """Parts with names of their own, a unit in two places, one that was exchanged while fused."""
    parts = zip(("conv", "act", "bn"), depthwise_unit(8, 5), strict=True)
    named = nn.Sequential(OrderedDict(parts))
    model = nn.Sequential(named, OwnResidual(depthwise_unit(8, 5)), named)
    modules, keys = list(model.modules()), list(model.state_dict())
    assert fuse(model) == 2 and model[0] is model[2] and list(model.state_dict()) == keys
    model.eval()
    assert unfuse(model) == 2 and list(model.modules()) == modules
    assert not any(module.training for module in modules)
    fuse(model)
    model[1].inside[2] = norm = nn.BatchNorm2d(8)
    assert unfuse(model) == 2 and model[1].inside[2] is norm


def test_flags_hooks_and_other_parts():
    def conv(channels=8, out=8, kernel_size=5, groups=8, padding=2, **options):
        return nn.Conv2d(channels, out, kernel_size, groups=groups, padding=padding, **options)

    def unit(**changes):
        parts = dict(conv=conv(), act=nn.GELU(), bn=nn.BatchNorm2d(8))
        return nn.Sequential(*{**parts, **changes}.values())
    others = [
        unit(act=nn.ReLU()),
        unit(act=nn.GELU("tanh")),
        unit(conv=conv(groups=4)),
        unit(conv=conv(padding=1)),
        unit(conv=conv(stride=2)),
        unit(conv=conv(padding_mode="circular")),
        unit(conv=conv(kernel_size=(5, 3), padding=(2, 1))),
        unit(conv=conv(kernel_size=4)),
        unit(conv=nn.utils.parametrizations.weight_norm(conv())),
        unit(bn=nn.SyncBatchNorm(8)),
    ]
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
    assert fuse(model) == 2  # the unit within the hooked wrapper, and the one in two places
    assert type(model[0]) is Residual
    assert isinstance(model[0].fn, DepthwiseGELUBN) and not model[0].fn.residual
    assert model[1] is model[-1] and not model[1].training and not model[1][0].training
    assert model[0].fn.training and not model[0].fn[2].training


def test_parts_exchanged_afterwards(recwarn):
    """Whatever is no BatchNorm2d, or has a hook, is called, and a warning says so once."""
    model = MODELS["ours"]()
    fuse(model)
    x = torch.rand(4, 3, 64, 64)
    y = model.eval()(x)
    assert not recwarn.list
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), y)
    seen = []
    for block in blocks_of(model):
        assert type(block[2]) is nn.SyncBatchNorm
        block[2] = nn.BatchNorm2d(16).eval()
        block[1].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        model(x)
    assert len(seen) == 6
    assert ["SyncBatchNorm" in str(w.message) for w in recwarn.list] == [True, False]
    assert unfuse(model) == 3 and type(model.blocks[0][0].fn[2]) is nn.BatchNorm2d


def test_compiled_whole_and_under_ddp(tmp_path):
    plain, fused = (MODELS["ours"]() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    x = torch.rand(4, 3, 64, 64)
    want = plain(x)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    with group_of_one(tmp_path):
        ddp = nn.parallel.DistributedDataParallel(fused)
        ddp(x).square().sum().backward()
        want.square().sum().backward()
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3,
                                       atol=1e-4 * q.grad.abs().max().item() + 1e-6)


def test_what_looks_into_a_fused_model():
    """Exporters and tracers see the parts; those that cannot name `unfuse`."""
    model = MODELS["ours"]().eval()
    x = torch.rand(2, 3, 64, 64)
    want = model(x)
    fuse(model)
    exported = torch.export.export(model, (x,))
    assert "vit_convmixer" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"unfuse\(model\) first"):
        torch.fx.symbolic_trace(model.blocks)


def test_functional_and_forward_mode_derivatives():
    """Equal to those of the parts: jvp, jacfwd, jacrev, grad, vmap of grad, dual numbers."""
    plain = MODELS["ours"]().eval()
    for p in plain.parameters():
        p.requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x = torch.rand(2, 3, 64, 64)

    def derivatives(model):
        def f(x):
            return model(x).square().sum()
        yield torch.func.jvp(model, (x,), (x.flip(3),))[1]
        yield torch.func.grad(f)(x)
        yield torch.func.vmap(torch.func.grad(lambda image: f(image[None])))(x)
        yield torch.func.jacrev(lambda a: model(a * x))(torch.ones(()))
        yield torch.func.jacfwd(lambda a: model(a * x))(torch.ones(()))

    def tangent(model):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.flip(3))
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    for got, want in zip([*derivatives(fused), tangent(fused)],
                         [*derivatives(plain), tangent(plain)], strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
