"""`fuse` finds the unit in any model and takes it in; `unfuse` gives the model back."""
import copy
import functools
import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse, unfuse
from kernels.module import FusedResidual, FusedSequential
from mixer.models import create_model
from mixer.models.convmixer import Residual, depthwise_unit
from tests.helpers.networks import authors_convmixer
from tests.helpers.ranks import group_of_one


def timm_convmixer():
    convmixer = pytest.importorskip("timm.models.convmixer", reason="needs timm: pip install timm")
    return convmixer.ConvMixer(dim=16, depth=3, kernel_size=5, patch_size=8, num_classes=4)


class OwnResidual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return x + self.inside(x)


class WithParameter(OwnResidual):
    def __init__(self, inside):
        super().__init__(inside)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.inside(x) + x


class Half(OwnResidual):
    def forward(self, x):
        return self.inside(x) * 0.5 + x


def three(wrapper=lambda unit: unit):
    """A patch embedding and three wrapped units."""
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), *(wrapper(depthwise_unit(16, 5)) for _ in "123"))


MODELS = {
    "ours": lambda: create_model("convmixer", dim=16, depth=3, kernel_size=5, patch=8,
                                 image_size=64, num_classes=4),
    "timm's": timm_convmixer, "the authors'": lambda: authors_convmixer(16, 3, 5, 8, 4),
    "without residual": three, "another residual": lambda: three(OwnResidual),
    "a residual with a parameter": lambda: three(WithParameter),
    "half a residual": lambda: three(Half)}


def count(model, kind):
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_fuse_and_unfuse(name):
    torch.manual_seed(0)
    plain = MODELS[name]()
    fused = copy.deepcopy(plain)
    tensors = {key: t.data_ptr() for key, t in fused.state_dict(keep_vars=True).items()}
    before, attributes = repr(fused), [set(vars(module)) for module in fused.modules()]
    assert fuse(fused) == count(fused, DepthwiseGELUBN) == 3
    residual = name not in ("without residual", "half a residual")
    assert count(fused, FusedResidual) == 3 * residual
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
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert not any(m.training for m in model.modules())
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert unfuse(fused) == 0 and fuse(fused) == 3


class InTraining(OwnResidual):
    def forward(self, x):
        return self.inside(x) + x if self.training else x


class AtRandom(OwnResidual):
    def forward(self, x):
        return self.inside(x) + x if random.random() < 0.9 else x


class Wrapped(OwnResidual):
    @functools.wraps(OwnResidual.forward)
    def forward(self, x):
        return 3 * OwnResidual.forward(self, x)


Typed = type("Typed", (OwnResidual,), {"forward": eval("lambda self, x: self.inside(x) + x")})


@pytest.mark.parametrize("wrapper", [Half, InTraining, AtRandom, Wrapped, Typed])
def test_only_a_plain_residual_is_taken_in(wrapper):
    """Also one that does something else at random, by a decorator, or where nobody can read it."""
    model, x = nn.Sequential(wrapper(depthwise_unit(8, 5))), torch.rand(2, 8, 6, 6)
    random.seed(1)  # both keep the branch
    want = [copy.deepcopy(model).train(training)(x) for training in (True, False)]
    assert fuse(model) == 1 and type(model[0]) is wrapper
    random.seed(1)
    for training, y in zip((True, False), want, strict=True):
        model.train(training)
        torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-5, atol=1e-5)


def test_names_and_modules_are_given_back():
    """Parts with names of their own; a unit in three places, one of them in a residual; a part
    replaced while fused."""
    parts = OrderedDict(zip(("conv", "act", "bn"), depthwise_unit(8, 5), strict=True))
    named = nn.Sequential(parts)
    model = nn.Sequential(named, OwnResidual(depthwise_unit(8, 5)), named, OwnResidual(named))
    modules, keys = list(model.modules()), list(model.state_dict())
    x = torch.rand(4, 8, 6, 6)
    want = copy.deepcopy(model)(x)
    assert fuse(model) == 2 and list(model.state_dict()) == keys
    torch.testing.assert_close(copy.deepcopy(model)(x), want, rtol=1e-4, atol=1e-5)
    model.eval()
    assert unfuse(model) == 2 and list(model.modules()) == modules
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Sequential
    assert not any(module.training for module in modules)
    fuse(model)
    model[1].inside[2] = norm = nn.BatchNorm2d(8)
    assert unfuse(model) == 2 and model[1].inside[2] is norm


def test_other_parts_and_hooks_stay():
    def conv(channels=8, out=8, kernel_size=5, groups=8, padding=2, **options):
        return nn.Conv2d(channels, out, kernel_size, groups=groups, padding=padding, **options)

    def unit(**changes):
        parts = dict(conv=conv(), act=nn.GELU(), bn=nn.BatchNorm2d(8))
        return nn.Sequential(*{**parts, **changes}.values())
    convs = [conv(groups=4), conv(padding=1), conv(stride=2), conv(padding_mode="circular"),
             conv(kernel_size=(5, 3), padding=(2, 1)), conv(kernel_size=4),
             nn.utils.parametrizations.weight_norm(conv())]
    others = [*(unit(conv=conv) for conv in convs), unit(act=nn.ReLU()), unit(act=nn.GELU("tanh")),
              unit(bn=nn.SyncBatchNorm(8))]
    hooked = [unit() for _ in range(4)]
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[1][1].register_forward_pre_hook(lambda *_: None)
    hooked[2][0].register_full_backward_hook(lambda *_: None)
    hooked[3][0].forward = hooked[3][0].forward
    wrapper = Residual(unit())
    wrapper.register_forward_hook(lambda *_: None)
    for module in (*others, *hooked):
        with pytest.raises(ValueError, match="nothing to fuse"):
            fuse(nn.Sequential(module))
    model = nn.Sequential(wrapper, unit(), *others, *hooked)
    model[1].eval()
    model[0].fn[2].eval()
    assert fuse(model) == 2  # one of them within the hooked wrapper
    assert type(model[0]) is Residual and isinstance(model[0].fn, DepthwiseGELUBN)
    assert not model[1].training and not model[1][0].training
    assert model[0].fn.training and not model[0].fn[2].training


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def replaced(part, model, name):
    """Another layer in its place, of the same type or not."""
    other = (nn.ReLU() if type(part) is nn.GELU else nn.InstanceNorm2d(16)
             if type(part) is nn.BatchNorm2d else nn.Conv2d(
                 part.in_channels, 16, part.kernel_size, part.stride, part.padding,
                 groups=part.groups, padding_mode="reflect" if part.groups > 1 else "zeros"))
    model.set_submodule(name, other)


def forward_replaced(part, *_):
    part.forward = lambda x: 3 * type(part).forward(part, x)


CHANGES = {
    "forward hook": lambda part, *_: part.register_forward_hook(lambda m, args, y: 2 * y.square()),
    "forward pre-hook": lambda part, *_: part.register_forward_pre_hook(
        lambda module, args: (args[0].square(),)),
    "backward hook": lambda part, *_: part.register_full_backward_hook(
        lambda module, gradients, _: tuple(g if g is None else 2 * g for g in gradients)),
    "backward pre-hook": lambda part, *_: part.register_full_backward_pre_hook(
        lambda module, gradients: tuple(2 * g for g in gradients)),
    "parametrized": lambda part, *_: nn.utils.parametrize.register_parametrization(
        part, "weight", Negated()),
    "replaced": replaced, "forward replaced": forward_replaced}
PARTS = [f"{unit}.{i}" for unit, start in (("stem", 0), ("blocks.1.0.fn", 0), ("blocks.1", 1))
         for i in range(start, start + 3)]


@pytest.mark.filterwarnings("ignore:DepthwiseGELUBN calls its parts")
@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_a_part_after_fuse_counts(change):
    """Of a patch embedding, a depthwise and a pointwise unit: as without `fuse`."""
    skipped = {"parametrized": ("stem.1", "blocks.1.2", "blocks.1.0.fn.1", "blocks.1.0.fn"),
               "backward hook": ("stem.0",), "replaced": ("blocks.1.0.fn",)}
    for name in {*PARTS, "blocks.1.0.fn"}.difference(skipped.get(change, ())):
        results = []
        for state in ("unchanged", "plain", "fused"):
            torch.manual_seed(0)
            model = MODELS["ours"]()
            if state == "fused":
                fuse(model)
            if state != "unchanged":
                CHANGES[change](model.get_submodule(name), model, name)
            y = model(torch.rand(4, 3, 64, 64))
            gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
            results.append([y.detach(), *gradients])
        unchanged, plain, fused = results
        assert len(unchanged) != len(plain) or not all(map(torch.allclose, unchanged, plain)), name
        for a, b in zip(plain, fused, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-6,
                                       msg=f"{name}: {{}}".format)


def test_a_warning_says_once_that_parts_are_called(recwarn):
    model, x = MODELS["ours"](), torch.rand(4, 3, 64, 64)
    fuse(model)
    y = model.eval()(x)
    assert not recwarn.list
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), y)
    assert ["SyncBatchNorm" in str(w.message) for w in recwarn.list] == [True]
    assert unfuse(model) == 3 and type(model.blocks[0][0].fn[2]) is nn.SyncBatchNorm


def test_compiled_whole_and_under_ddp(tmp_path):
    """Equal outputs and gradients; fullgraph: no graph break."""
    plain = MODELS["ours"]()
    x = torch.rand(4, 3, 64, 64)

    def check(wrap):
        fused = copy.deepcopy(plain)
        fuse(fused)
        results = []
        for model, call in ((plain, plain), (fused, wrap(fused))):
            y = call(x)
            model.zero_grad()
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3,
                                       atol=1e-4 * want.abs().max().item() + 1e-6)
    check(functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    with group_of_one(tmp_path):
        check(nn.parallel.DistributedDataParallel)


def test_what_looks_into_a_fused_model():
    """Exporters see the parts; torch.fx, which cannot, fails."""
    model = MODELS["ours"]().eval()
    x = torch.rand(2, 3, 64, 64)
    want = model(x)
    fuse(model)
    exported = torch.export.export(model, (x,))
    assert "vit_convmixer" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model.blocks)


def derivatives(model, x):
    """What takes derivatives in forward mode, or transforms of torch.func."""
    def by_dual_numbers():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.flip(3))
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    def jvp():
        return torch.func.jvp(model, (x,), (x.flip(3),))[1]
    # a compiled jvp fails too, but within PyTorch's own asserts, and may leave its modes behind
    return [by_dual_numbers, jvp,
            lambda: torch.func.grad(lambda x: model(x).square().sum())(x),
            lambda: torch.func.vmap(lambda image: model(image[None]))(x)]


@pytest.mark.parametrize("dense", [True, False], ids=["", "the depthwise half alone"])
def test_functional_and_forward_mode_derivatives_are_errors(dense):
    """They might be 0 in silence. After `unfuse` they are those of the parts."""
    plain, x = MODELS["ours"]().eval().requires_grad_(False), torch.rand(2, 3, 64, 64)
    fused = copy.deepcopy(plain)
    fuse(fused)
    if not dense:
        for module in fused.modules():
            module.__class__ = nn.Sequential if type(module) is FusedSequential else type(module)
    for derivative in derivatives(fused, x):
        with pytest.raises((RuntimeError, NotImplementedError), match="autograd.Function"):
            derivative()
    unfuse(fused)
    for got, want in zip(derivatives(fused, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(got(), want(), rtol=1e-4, atol=1e-5)
