"""The drop-in module, and `fuse(model)`, which makes a model of plain parts use it."""
import inspect
import math
import re
import warnings
from collections import OrderedDict

import torch
from torch import nn

from .depthwise_cpu import FEWEST_OUTPUTS, dense_gelu_bn
from .depthwise_op import depthwise_gelu_bn, runs_whole
from .reference import update_running_stats


class _Sliceable(nn.Sequential):
    """A slice of it is a plain Sequential."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


class DepthwiseGELUBN(_Sliceable):
    """BatchNorm(GELU(depthwise_conv(x))) (+ x) as one operation: (N, C, H, W) -> (N, C, H, W).

    A Sequential(Conv2d, GELU, BatchNorm2d) with the same state-dict keys and the same behaviour of
    BatchNorm: momentum (also None), eval, frozen, without affine or running statistics. It calls
    its parts one by one in two cases: they are as fast (see `runs_whole`), or a part has a hook or
    another type, such as nn.SyncBatchNorm. The second case warns once. Raises ValueError for an
    even kernel size.
    """
    def __init__(self, dim: int, kernel_size: int, residual: bool = False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre")
        super().__init__(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
                         nn.GELU(), nn.BatchNorm2d(dim))
        self.residual, self.kernel_size = residual, kernel_size

    def forward(self, x: torch.Tensor, residual: bool = False) -> torch.Tensor:
        residual = residual or self.residual
        if runs_whole(x, x.numel(), self.kernel_size):
            if kind_of(self) == "depthwise":
                conv, _, bn = self
                return run_fused(depthwise_gelu_bn, x, conv, bn, residual=residual)
            if not torch.compiler.is_compiling():
                warnings.warn("DepthwiseGELUBN calls its parts one by one: one of them has a hook "
                              f"or was replaced: {list(self)}", stacklevel=2)
        y = super().forward(x)
        return y + x if residual else y

    def extra_repr(self):
        return "residual=True" if self.residual else ""


class FusedResidual(nn.Module):
    """x -> fn(x) + x, where fn is its only part. A DepthwiseGELUBN without hooks adds x itself."""

    def forward(self, x):
        fn, = self.children()
        if type(fn) is DepthwiseGELUBN and not has_hooks(fn):
            return fn(x, residual=True)
        return fn(x) + x


class FusedSequential(_Sliceable):
    """A Sequential that computes each dense unit among its parts as one operation.

    A dense unit is Conv2d, GELU, BatchNorm2d with a conv over all channels whose stride is its
    kernel: the pointwise half of a ConvMixer layer, and the patch embedding. It calls the parts one
    by one on a GPU, under torch.compile, and whenever DepthwiseGELUBN does.
    `kernel_size` is that of the depthwise convs of the model.
    """
    def forward(self, x):
        if (x.device.type != "cpu" or torch.compiler.is_compiling()
                or not runs_whole(x, math.inf, self.kernel_size)):  # inf: each unit is asked below
            return super().forward(x)
        # a dense unit takes three parts at once; others run as they are
        parts = list(self)
        while parts:
            part, *rest = parts
            dense = kind_of(parts[:3]) == "dense"
            if dense and x.numel() * len(part.weight) / part.weight[0].numel() >= FEWEST_OUTPUTS:
                _, bn, *parts = rest
                x = run_fused(dense_gelu_bn, x, part, bn)
            else:
                x, parts = part(x), rest
        return x


def run_fused(operation, x, conv, bn, **options):
    """The operation with the tensors of its parts; updates the running statistics as bn would."""
    # None: those of this batch, as in a BatchNorm without running statistics
    mean, var = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    y, mean, var = operation(x, conv.weight, conv.bias, bn.weight, bn.bias, mean, var,
                             eps=bn.eps, **options)
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        update_running_stats(bn, mean, var, y.numel() // y.shape[1])
    return y


# Which modules are fused

def kind_of(unit: list[nn.Module]) -> str | None:
    """Either "depthwise" for a conv with odd kernel, stride 1 and "same" padding; or "dense" for a
    conv over all channels whose stride is its kernel; or None if the parts cannot be fused.
    """
    # exactly the three parts, whose forward is their own
    types = [type(module) for module in unit]
    if types != [nn.Conv2d, nn.GELU, nn.BatchNorm2d] or any(map(has_hooks, unit)):
        return None
    conv, act, bn = unit
    K = conv.kernel_size[0]
    # what neither operation computes
    if (act.approximate != "none" or bn.num_features != conv.out_channels
            or conv.kernel_size != (K, K) or conv.dilation != (1, 1)
            or conv.padding_mode != "zeros"):
        return None
    # one of the two convs
    if (conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1)
            and K % 2 == 1 and conv.padding in ((K // 2, K // 2), "same")):
        return "depthwise"
    if conv.groups == 1 and conv.stride == (K, K) and conv.padding in ((0, 0), "valid"):
        return "dense"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks, or a forward replaced on the instance, as by accelerate, fairscale."""
    # No public API tells, and a fused unit would not run the hooks of its parts.
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks
                or "forward" in vars(module))


def _is_unit(module):
    return (type(module) is nn.Sequential and not has_hooks(module)
            and kind_of(module) == "depthwise")


def _is_residual(module):
    """Whether it holds one unit, and its forward is written `return self.fn(x) + x`, as timm's, the
    authors' and ours. So it does nothing else, such as stochastic depth."""
    children = list(module.named_children())
    if len(children) != 1 or not _is_unit(children[0][1]) or has_hooks(module):
        return False
    fn = children[0][0]
    written = (r"def forward\(self, x(: [\w.]+)?\)( -> [\w.]+)?:\s+return "
               rf"(self\.{fn}\(x\) \+ x|x \+ self\.{fn}\(x\))\s*")
    try:
        source = inspect.getsource(type(module).forward.__code__)  # not what it wraps
    except (AttributeError, OSError):  # compiled, or typed into an interpreter
        return False
    return bool(re.fullmatch(written, source.lstrip()))


# fuse and unfuse

def fuse(model: nn.Module) -> int:
    """Make each Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv one operation.

    Returns their number. The modules get another class; parts, names, weights and flags stay as
    they are, and `unfuse` gives the class back. A wrapper that adds the input (timm's and the
    authors' Residual) becomes a FusedResidual, and a Sequential with a pointwise conv or a patch
    embedding a FusedSequential. Modules with hooks stay. Raises ValueError if there is no
    depthwise conv to fuse.
    """
    # the depthwise units, and wrappers that add their input
    count = 0
    for module in model.modules():  # a wrapper comes before its unit
        if _is_residual(module):
            _become(module, FusedResidual)
        elif _is_unit(module):
            _become(module, DepthwiseGELUBN, residual=False, kernel_size=module[0].kernel_size[0])
            count += 1
    units = [module for module in model.modules() if isinstance(module, DepthwiseGELUBN)]
    if not count:
        raise ValueError(f"nothing to fuse in {type(model).__name__} ({len(units)} fused already)"
                         ": no Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv of odd "
                         "kernel, stride 1, 'same' padding, without hooks")

    # the dense units, which run as one operation where the depthwise ones do
    kernel_size = min(unit.kernel_size for unit in units)
    for module in model.modules():
        parts = list(module) if type(module) is nn.Sequential else []
        if any(kind_of(parts[i:i + 3]) == "dense" for i in range(len(parts))):
            _become(module, FusedSequential, kernel_size=kernel_size)
    return count


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`; return the number of units. Parts replaced since then stay."""
    fused = [module for module in model.modules() if "before_fuse" in vars(module)]
    count = sum(isinstance(module, DepthwiseGELUBN) for module in fused)
    for module in fused:
        module.__class__, attributes = module.before_fuse
        for name in (*attributes, "before_fuse"):
            delattr(module, name)
    return count


def _become(module, kind, **attributes):
    """Give a module another class and these attributes, and let it remember both."""
    module.before_fuse = type(module), tuple(attributes)
    module.__class__ = kind
    vars(module).update(attributes)
