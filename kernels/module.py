"""The drop-in module, and `fuse(model)`, which puts it in place of its three parts."""
import inspect
import math
import re
import warnings
from functools import partial

import torch
from torch import nn

from .depthwise_cpu import dense_gelu_bn
from .depthwise_op import depthwise_gelu_bn, runs_whole
from .reference import update_running_stats


class DepthwiseGELUBN(nn.Sequential):
    """BatchNorm(GELU(depthwise_conv(x))) (+ x) as one operation: (N, C, H, W) -> (N, C, H, W).

    It holds the parts of the Sequential(Conv2d, GELU, BatchNorm2d) that it replaces, under the same
    state-dict keys. BatchNorm behaves as PyTorch's: momentum (also None), eval, frozen, without
    affine or running statistics. It calls the parts one by one and warns once if a part has a hook
    or was replaced by another type, nn.SyncBatchNorm too. On a CPU it calls them where they are
    faster, too: see depthwise_cpu.fusing_pays. Raises ValueError for an even kernel size.
    """
    def __init__(self, dim: int, kernel_size: int, residual: bool = False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre")
        super().__init__(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
                         nn.GELU(), nn.BatchNorm2d(dim))
        self.residual, self.kernel_size = residual, kernel_size

    @classmethod
    def of(cls, unit: nn.Sequential, residual: bool = False):
        """One that shares the parts of `unit`. Raises ValueError if it computes something else."""
        if not is_depthwise_unit(unit):
            raise ValueError(f"{unit} is not Conv2d (depthwise, 'same'), GELU, BatchNorm2d")
        return _in_place_of(unit, cls, residual=residual, kernel_size=unit[0].kernel_size[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if runs_whole(x, x.numel(), self.kernel_size):
            if is_depthwise_unit(self):
                conv, _, bn = self
                return run(depthwise_gelu_bn, x, conv, bn, residual=self.residual)
            if not torch.compiler.is_compiling():
                warnings.warn("DepthwiseGELUBN calls its parts one by one: one of them has a hook "
                              f"or was exchanged: {list(self)}", stacklevel=2)
        y = super().forward(x)
        return y + x if self.residual else y

    def extra_repr(self):
        return "residual=True" if self.residual else ""


FEWEST_RESULTS = 500_000  # of a dense unit: below, saving memory takes a fifth of its time


class FusedSequential(nn.Sequential):
    """A Sequential that computes its Conv2d, GELU, BatchNorm2d, one after another, as one.

    Convs over all channels whose kernel is their stride: the pointwise conv of a ConvMixer layer,
    and its patch embedding. On the CPU only, and not compiled; elsewhere, and when DepthwiseGELUBN
    would do so, it calls the parts one by one. `kernel_size`: of the depthwise convs around it.
    """
    def forward(self, x):
        if (not runs_whole(x, math.inf, self.kernel_size) or x.device.type != "cpu"
                or torch.compiler.is_compiling()):
            return super().forward(x)
        modules = list(self)
        while modules:
            if is_dense_unit(modules[:3]) and self.pays(x, modules[0]):
                conv, _, bn, *modules = modules
                x = run(dense_gelu_bn, x, conv, bn)
            else:
                module, *modules = modules
                x = module(x)
        return x

    def pays(self, x, conv):
        P = conv.stride[0]
        results = len(x) * conv.out_channels * math.prod(side // P for side in x.shape[2:])
        return results >= FEWEST_RESULTS and runs_whole(x, results, self.kernel_size)


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


# Which modules are fused

def is_depthwise_unit(unit: list[nn.Module]) -> bool:
    """Whether it is BatchNorm(GELU(conv)) with a depthwise conv of odd kernel and stride 1."""
    if not _is_plain(unit):
        return False
    conv, _, _ = unit
    K = conv.kernel_size[0]
    return (conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1)
            and conv.kernel_size == (K, K) and K % 2 == 1
            and conv.padding in ((K // 2, K // 2), "same"))


def is_dense_unit(unit: list[nn.Module]) -> bool:
    """Whether it is BatchNorm(GELU(conv)) with a conv over all channels, stride = kernel."""
    if not _is_plain(unit):
        return False
    conv, _, _ = unit
    P = conv.stride[0]
    return (conv.groups == 1 and conv.kernel_size == conv.stride == (P, P)
            and conv.padding in ((0, 0), "valid"))


def _is_plain(unit):
    if [type(module) for module in unit] != [nn.Conv2d, nn.GELU, nn.BatchNorm2d]:
        return False
    conv, act, bn = unit
    return (not any(map(has_hooks, unit)) and act.approximate == "none"
            and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
            and bn.num_features == conv.out_channels)


def has_hooks(module):
    """Also a forward that was replaced on the instance, as accelerate and fairscale do."""
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks
                or "forward" in vars(module))


def _is_residual(module):
    """Whether it holds a unit, and its forward is written `return self.fn(x) + x`, as timm's, the
    authors' and ours. Then it cannot do anything else, at random for example."""
    if len(module._modules) != 1 or module._parameters or module._buffers or has_hooks(module):
        return False
    (fn, unit), = module._modules.items()
    written = (r"def forward\(self, x(: [\w.]+)?\)( -> [\w.]+)?:\s+return "
               rf"(self\.{fn}\(x\) \+ x|x \+ self\.{fn}\(x\))\s*")
    try:
        source = inspect.getsource(type(module).forward.__code__)  # of this one, not one it wraps
    except (AttributeError, OSError):  # compiled, or typed into an interpreter
        return False
    return _is_unit(unit) and bool(re.fullmatch(written, source.lstrip()))


def _is_unit(module):
    return type(module) is nn.Sequential and not has_hooks(module) and is_depthwise_unit(module)


# The replacement

def fuse(model: nn.Module) -> int:
    """Replace each Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv; return how many.

    Weights, buffers and train/eval flags stay the same objects. A wrapper that adds the input
    (timm's and the authors' Residual) is replaced together with its Sequential. The Sequentials
    around them become FusedSequential. Modules with hooks stay. `unfuse` undoes it. Raises
    ValueError if there is no depthwise conv to replace.
    """
    replaced = {None: None}
    _replace(model, _block_for, replaced)
    count = sum(new is not old for old, new in replaced.items())
    blocks = [module for module in model.modules() if isinstance(module, DepthwiseGELUBN)]
    if not count:
        raise ValueError(f"nothing to fuse in the parts of {type(model).__name__} ({len(blocks)} "
                         "fused already): no Sequential(Conv2d, GELU, BatchNorm2d) with a "
                         "depthwise conv of odd kernel, stride 1, 'same' padding, without hooks")
    kernel_size = min(block.kernel_size for block in blocks)
    _replace(model, partial(_dense_for, kernel_size=kernel_size), {None: None})
    return count


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`; return the number of blocks. Parts exchanged since then stay exchanged."""
    restored = {}
    for parent in reversed(list(model.modules())):  # inner modules first
        for name, child in parent._modules.items():
            if hasattr(child, "replaced"):
                original, = child.replaced
                original._modules.update(child._modules)
                original.training = child.training
                restored[child] = parent._modules[name] = original
    return sum(isinstance(module, DepthwiseGELUBN) for module in restored)


def _replace(parent, replacement_for, replaced):
    """Replace the children for which there is a replacement, and theirs. `replaced` holds the new
    module of each one that was seen, because a module may have several places in a model."""
    for name, child in parent._modules.items():
        if child not in replaced:
            replaced[child] = replacement_for(child) or child
            _replace(replaced[child], replacement_for, replaced)
        parent._modules[name] = replaced[child]


def _block_for(module):
    """The block for a unit, or for a residual of one within a Sequential that keeps its name."""
    if _is_unit(module):
        return DepthwiseGELUBN.of(module)
    if not _is_residual(module):
        return None
    wrapper = _in_place_of(module, nn.Sequential)
    (name, unit), = module._modules.items()
    wrapper._modules[name] = DepthwiseGELUBN.of(unit, residual=True)
    return wrapper


def _dense_for(module, kernel_size):
    parts = list(module._modules.values())
    if type(module) is not nn.Sequential or has_hooks(module) or not any(
            is_dense_unit(parts[i:i + 3]) for i in range(len(parts))):
        return None
    return _in_place_of(module, FusedSequential, kernel_size=kernel_size)


def _in_place_of(module, kind, **attributes):
    """A module of that kind with the parts and the flag of `module`, which it remembers."""
    replacement = kind.__new__(kind)
    nn.Module.__init__(replacement)
    vars(replacement).update(
        _modules=module._modules.copy(), training=module.training,
        replaced=(module,),  # in a tuple, so that it is not a submodule
        **attributes)
    return replacement
