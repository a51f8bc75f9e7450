"""The drop-in module, and `fuse(model)`, which puts it in place of its three parts."""
import copy
import math
import operator
from collections import OrderedDict
from functools import partial

import torch
from torch import distributed as dist
from torch import fx, nn

from . import depthwise_cpu
from .dense_cpu import dense_gelu_bn
from .depthwise_op import depthwise_gelu_bn, is_transformed, warn_once
from .reference import update_running_stats
from .sync import SyncBatchNorm, over_ranks


class DepthwiseGELUBN(nn.Sequential):
    """BatchNorm(GELU(depthwise_conv(x))) (+ x) as one operation: (N, C, H, W) -> (N, C, H, W).

    It holds the parts of the Sequential(Conv2d, GELU, BatchNorm2d) that it replaces, under the same
    state-dict keys. BatchNorm behaves as PyTorch's: momentum (also None), eval, frozen, without
    affine or running statistics. It calls the parts one by one and warns once if a part has a hook,
    if a part was replaced by another type, or while BatchNorm is synchronised over several ranks.
    On a CPU it calls them where they are faster, too: see depthwise_cpu.fusing_pays.
    Raises ValueError for an even kernel size.
    """
    def __init__(self, dim: int, kernel_size: int, residual: bool = False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre")
        super().__init__(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
                         nn.GELU(), nn.BatchNorm2d(dim))
        self.residual, self.kernel_size = residual, kernel_size

    @classmethod
    def of_parts(cls, conv: nn.Module, act: nn.Module, bn: nn.Module, residual: bool = False):
        """One that shares these modules. Raises ValueError if they are not what it computes."""
        if why_not := cannot_fuse(conv, act, bn):
            raise ValueError(why_not)
        self = cls.__new__(cls)
        nn.Sequential.__init__(self, conv, act, bn)
        self.residual, self.kernel_size = residual, conv.kernel_size[0]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_fused(x):
            conv, _, bn = self
            return run(depthwise_gelu_bn, x, conv, bn, residual=self.residual)
        y = super().forward(x)
        return y + x if self.residual else y

    def is_fused(self, x):
        if not pays(x, x.numel(), self.kernel_size) or must_be_plain(x) or x.numel() == 0:
            return False
        _, _, bn = self
        why_not = cannot_fuse(*self) or synchronised(bn)
        if why_not and not torch.compiler.is_compiling():
            warn_once(f"DepthwiseGELUBN calls its parts one by one: {why_not}")
        return not why_not

    def extra_repr(self):
        return "residual=True" if self.residual else ""

    def __prepare_scriptable__(self):  # torch.jit.script calls this
        raise RuntimeError("torch.jit.script cannot compile a fused model; call "
                           "kernels.unfuse(model) first")


def run(operation, x, conv, bn, **options):
    """The operation with the tensors of its parts; updates the running statistics as bn would."""
    mean = var = None  # those of this batch
    if not bn.training and bn.running_mean is not None:
        mean, var = bn.running_mean, bn.running_var
    y, mean, var = operation(x, conv.weight, conv.bias, bn.weight, bn.bias, mean, var,
                             eps=bn.eps, **options)
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        update_running_stats(bn, mean, var, y.numel() // y.shape[1])
    return y


def must_be_plain(x):
    """Whether only plain operations are right: for exporters and torch.func, which look into them.

    Raises RuntimeError for torch.fx, which would not see the parts.
    """
    if isinstance(x, fx.Proxy):
        raise RuntimeError("torch.fx cannot trace a fused model; call kernels.unfuse(model) first")
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or is_transformed()


def pays(x, elements, kernel_size):
    """Whether a block is faster than its parts; on a GPU always.

    Asked first, and quickly, because a whole evaluation may take a millisecond.
    """
    if isinstance(x, fx.Proxy) or x.device.type != "cpu":
        return True
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return depthwise_cpu.fusing_pays(dtype, elements, kernel_size)


def synchronised(bn):
    return "its BatchNorm is synchronised over several ranks" if over_ranks(bn) else None


FEWEST_RESULTS = 500_000  # of a dense unit: below, saving memory takes a fifth of its time


class FusedSequential(nn.Sequential):
    """A Sequential that computes its Conv2d, GELU, BatchNorm2d, one after another, as one.

    Convs over all channels whose kernel is their stride: the pointwise conv of a ConvMixer layer,
    and its patch embedding. On the CPU only, and not compiled; elsewhere, and when DepthwiseGELUBN
    would do so, it calls the parts one by one. `kernel_size`: of the depthwise convs around it.
    """
    def __init__(self, parts: OrderedDict, kernel_size: int):
        super().__init__(parts)
        self.kernel_size = kernel_size

    def forward(self, x):
        if (not pays(x, math.inf, self.kernel_size) or must_be_plain(x) or x.device.type != "cpu"
                or torch.compiler.is_compiling() or x.numel() == 0):
            return super().forward(x)
        modules = list(self)
        while modules:
            if len(modules) > 2 and self.is_fused(x, *modules[:3]):
                conv, _, bn, *modules = modules
                x = run(dense_gelu_bn, x, conv, bn)
            else:
                module, *modules = modules
                x = module(x)
        return x

    def is_fused(self, x, conv, act, bn):
        if not is_dense_unit(conv, act, bn) or synchronised(bn):
            return False
        P = conv.stride[0]
        results = len(x) * conv.out_channels * math.prod(side // P for side in x.shape[2:])
        return results >= FEWEST_RESULTS and pays(x, results, self.kernel_size)


def is_dense_unit(conv: nn.Module, act: nn.Module, bn: nn.Module) -> bool:
    """Whether this is BatchNorm(GELU(conv)) with a conv over all channels, stride = kernel."""
    return (not _not_plain(conv, act, bn) and conv.groups == 1 and conv.padding_mode == "zeros"
            and conv.kernel_size == conv.stride == (conv.stride[0],) * 2
            and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
            and bn.num_features == conv.out_channels)


def cannot_fuse(conv: nn.Module, act: nn.Module, bn: nn.Module) -> str | None:
    """Why DepthwiseGELUBN does not compute what these three do, in words, or None if it does."""
    if why_not := _not_plain(conv, act, bn):
        return why_not
    C, K = conv.in_channels, conv.kernel_size[0]
    if ((conv.out_channels, conv.groups) != (C, C) or conv.padding_mode != "zeros"
            or (conv.stride, conv.dilation) != ((1, 1), (1, 1))):
        return f"{conv} is not a depthwise conv of stride 1"
    if conv.kernel_size != (K, K) or K % 2 == 0 or conv.padding not in ((K // 2, K // 2), "same"):
        return f"{conv} has no square, odd kernel with 'same' padding"
    if bn.num_features != C:
        return f"{bn} does not fit {C} channels"
    return None


def _not_plain(conv, act, bn):
    """Why these are not Conv2d, the exact GELU and BatchNorm2d, without hooks; None if they are."""
    for module, *types in ((conv, nn.Conv2d), (act, nn.GELU),
                           (bn, nn.BatchNorm2d, SyncBatchNorm, nn.SyncBatchNorm)):
        if type(module) not in types:
            return f"{type(module).__name__} is not nn.{types[0].__name__}"
        if has_hooks(module):
            return f"a hook on {type(module).__name__}"
    if act.approximate != "none":
        return f"{act} is not the exact GELU"
    if isinstance(bn, nn.SyncBatchNorm) and bn.process_group not in (None, dist.group.WORLD):
        return "SyncBatchNorm has its own process group"
    return None


def has_hooks(module):
    """Also a forward that was replaced on the instance, as accelerate and fairscale do."""
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks
                or "forward" in vars(module))


class _FusedResidual(nn.Sequential):
    """Replaces a wrapper x -> fn(x) + x. fn keeps its name, so state-dict keys do not change."""


def fuse(model: nn.Module) -> int:
    """Replace each Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv; return how many.

    Weights, buffers and train/eval flags stay the same objects. A wrapper that adds the input
    (timm's and the authors' Residual) is replaced together with its Sequential. The Sequentials
    around them become FusedSequential. Modules with hooks stay. `unfuse` undoes it. Raises
    ValueError if there is no depthwise conv to replace.
    """
    if _is_unit(model) or _is_residual_of_unit(model):
        raise ValueError("fuse replaces the parts of a model, and this is one: "
                         "DepthwiseGELUBN.of_parts(conv, act, bn, residual) gives its block")
    blocks = _replace(model, _depthwise_replacement)
    if not blocks and (fused := sum(isinstance(m, DepthwiseGELUBN) for m in model.modules())):
        raise ValueError(f"already fused: {fused} blocks")
    if not blocks:
        raise ValueError("nothing to fuse: no Sequential(Conv2d, GELU, BatchNorm2d) with a "
                         "depthwise conv of odd kernel, stride 1 and 'same' padding, without hooks")
    kernel_size = min(module[0].kernel_size[0] for module in model.modules()
                      if isinstance(module, DepthwiseGELUBN))
    _replace(model, partial(_dense_replacement, kernel_size=kernel_size))
    return blocks


def _replace(model, replacement_for):
    """Replace the children for which there is a replacement; return the number of replacements."""
    replacements = {}  # a module may have several places in a model
    for parent in list(model.modules()):  # outer modules first
        if parent in replacements:
            continue
        for name, child in list(parent._modules.items()):
            replacement = replacements.get(child) or replacement_for(child)
            if replacement is not None:
                replacement.training = child.training
                replacement.replaced = (child,)  # in a tuple, so that it is not a submodule
                replacements[child] = parent._modules[name] = replacement
    return len(replacements)


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`; return the number of blocks. Parts exchanged since then stay exchanged."""
    originals = {}
    for parent in reversed(list(model.modules())):  # inner modules first
        for name, child in list(parent._modules.items()):
            if hasattr(child, "replaced"):
                originals[child] = parent._modules[name] = _original(child)
    return sum(not isinstance(module, FusedSequential) for module in originals)


def _dense_replacement(module, kernel_size):
    if type(module) is not nn.Sequential or has_hooks(module):
        return None
    parts = list(module)
    if any(is_dense_unit(*parts[i:i + 3]) for i in range(len(parts) - 2)):
        return FusedSequential(OrderedDict(module._modules), kernel_size)
    return None


def _depthwise_replacement(module):
    """The fused module for `module`, or None if it is neither a unit nor a residual of one."""
    if _is_unit(module):
        return DepthwiseGELUBN.of_parts(*module)
    if not _is_residual_of_unit(module):
        return None
    (name, unit), = module._modules.items()
    block = DepthwiseGELUBN.of_parts(*unit, residual=True)
    block.training = unit.training
    return _FusedResidual(OrderedDict({name: block}))


def _original(replacement):
    """The module that `replacement` replaced, with the present parts and flags."""
    module, = replacement.replaced
    unit, block = module, replacement
    if isinstance(replacement, _FusedResidual):
        (name, block), = replacement._modules.items()
        unit = module._modules[name]
    unit._modules.update(block._modules)
    unit.training, module.training = block.training, replacement.training
    return module


def _is_unit(module):
    return (type(module) is nn.Sequential and len(module) == 3 and not has_hooks(module)
            and cannot_fuse(*module) is None)


def _is_residual_of_unit(module):
    """Whether a module holds a unit and nothing else, and computes x -> unit(x) + x."""
    if module is None or len(module._modules) != 1 or module._parameters or module._buffers:
        return False
    if has_hooks(module) or vars(module).keys() != vars(nn.Module()).keys():
        return False  # what it computes may depend on an attribute of its own
    (name, unit), = module._modules.items()
    code = getattr(type(module).forward, "__code__", None)
    if code is None or code.co_freevars or not {name, "torch", "add"}.issuperset(code.co_names):
        return False  # it reads something else, which may be random, and which a trace cannot show
    return _is_unit(unit) and all(_adds_its_input(module, name, mode) for mode in (True, False))


class _ShallowTracer(fx.Tracer):
    """Traces a module's own forward, and calls its children without a look into them."""
    def is_leaf_module(self, module, name):
        return True


ADDITIONS = {("call_function", operator.add), ("call_function", torch.add), ("call_method", "add")}


def _adds_its_input(module, child, training):
    """Whether the forward of `module` is child(x) + x: input, child, sum, output, nothing else."""
    module = copy.copy(module)
    module.training = training
    try:
        x, branch, total, output = _ShallowTracer().trace(module).nodes
    except Exception:  # fx cannot trace it, or it has another number of nodes
        return False
    return (x.op == "placeholder"
            and (branch.op, branch.target, branch.args) == ("call_module", child, (x,))
            and (total.op, total.target) in ADDITIONS and total.args in ((x, branch), (branch, x))
            and not branch.kwargs and not total.kwargs and output.args == (total,))
