"""The drop-in module, and `fuse(model)`, which puts it where its three parts stand."""
import types
from collections import OrderedDict

import torch
from torch import distributed as dist
from torch import nn

from .depthwise_op import depthwise_gelu_bn, warn_once
from .sync import SyncBatchNorm, over_ranks, update_running_stats


class DepthwiseGELUBN(nn.Sequential):
    """BatchNorm(GELU(depthwise_conv(x))) (+ x) as one operation: (N, C, H, W) -> (N, C, H, W).

    It holds the parts of the Sequential(Conv2d, GELU, BatchNorm2d) that it replaces, and has their state-dict keys. BatchNorm
    behaves as PyTorch's: momentum (None too), eval, frozen, without affine or running statistics, over all ranks where it was
    converted by `sync_batch_norm` or to nn.SyncBatchNorm. Where a part was exchanged otherwise or given a hook since, the parts
    are called one by one, and a warning says so once.
    Raises ValueError for an even kernel size.
    """

    def __init__(self, dim, kernel_size, residual=False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre")
        super().__init__(
            nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
            nn.GELU(),
            nn.BatchNorm2d(dim),
        )
        self.residual = residual

    @classmethod
    def of_parts(cls, conv, act, bn, residual=False):
        """One that shares these modules. Raises ValueError where they are not what it computes."""
        why_not = cannot_fuse(conv, act, bn)
        if why_not:
            raise ValueError(why_not)
        self = cls.__new__(cls)
        nn.Sequential.__init__(self, conv, act, bn)
        self.residual = residual
        return self

    def forward(self, x):
        conv, act, bn = self
        why_not = cannot_fuse(conv, act, bn)
        sync = over_ranks(bn)
        if why_not or x.numel() == 0 and not sync:
            if why_not and not torch.compiler.is_compiling():
                warn_once(f"DepthwiseGELUBN calls its parts one by one: {why_not}")
            y = bn(act(conv(x)))
            return y + x if self.residual else y
        given = (bn.running_mean, bn.running_var) if not bn.training and bn.running_mean is not None else (None, None)
        y, mean, var, *count = depthwise_gelu_bn(x, conv.weight, conv.bias, bn.weight, bn.bias, *given, eps=bn.eps,
                                                 residual=self.residual, sync=sync)
        if bn.training and bn.track_running_stats and bn.running_mean is not None:
            update_running_stats(bn, mean, var, count[0] if sync else x.numel() // x.shape[1])
        return y

    def extra_repr(self):
        return "residual=True" if self.residual else ""


def cannot_fuse(conv, act, bn):
    """Why these three modules are not what DepthwiseGELUBN computes, in words, or None where they are."""
    for module, expected, *others in ((conv, nn.Conv2d), (act, nn.GELU), (bn, nn.BatchNorm2d, SyncBatchNorm, nn.SyncBatchNorm)):
        if type(module) not in (expected, *others):
            return f"{type(module).__name__} is not nn.{expected.__name__}"
        if has_hooks(module):
            return f"a hook on {type(module).__name__}"
    C, K = conv.in_channels, conv.kernel_size[0]
    if (conv.out_channels, conv.groups, conv.stride, conv.dilation, conv.padding_mode) != (C, C, (1, 1), (1, 1), "zeros"):
        return f"{conv} is not a depthwise conv of stride 1"
    if conv.kernel_size != (K, K) or K % 2 == 0 or conv.padding not in ((K // 2, K // 2), "same"):
        return f"{conv} has no square, odd kernel with 'same' padding"
    if act.approximate != "none":
        return f"{act} is not the exact GELU"
    if isinstance(bn, nn.SyncBatchNorm) and bn.process_group is not None and bn.process_group is not dist.group.WORLD:
        return "SyncBatchNorm has a process group of its own"
    if bn.num_features != C:
        return f"{bn} does not fit {C} channels"
    return None


def has_hooks(module):
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


class _Fused(nn.Sequential):
    """Stands where a wrapper x -> fn(x) + x stood, now inside fn; the name fn, and so the state-dict keys, stay."""


def fuse(model):
    """Put DepthwiseGELUBN where `model` has Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv; how many it replaced.

    Weights, buffers and train/eval flags stay the same objects; a wrapper that adds the input (timm's and the authors'
    Residual) is taken in. What carries hooks is left alone. `unfuse` undoes it.
    Raises ValueError where there is nothing to replace.
    """
    stand_ins = {}  # a module may stand in several places
    for parent in list(model.modules()):  # from the outside in
        if parent not in stand_ins:
            for name, child in list(parent._modules.items()):
                stand_in = stand_ins[child] if child in stand_ins else _stand_in(child)
                if stand_in is not None:
                    stand_ins[child] = parent._modules[name] = stand_in
    if not stand_ins:
        raise ValueError("nothing to fuse: no Sequential(Conv2d, GELU, BatchNorm2d) with a depthwise conv of odd kernel, "
                         "stride 1 and 'same' padding, free of hooks")
    return len(stand_ins)


def unfuse(model):
    """Undo `fuse`: how many blocks it put back. Parts exchanged meanwhile, as by convert_sync_batchnorm, stay exchanged."""
    originals = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if hasattr(child, "replaced"):
                originals[child] = parent._modules[name] = _original(child)
    return len(originals)


def _stand_in(module):
    """What takes a module's place when fused, or None."""
    inner = _only_child(module)
    if inner and _is_unit(module._modules[inner]) and _adds_its_input(module, inner) and not has_hooks(module):
        unit = module._modules[inner]
        block = DepthwiseGELUBN.of_parts(*unit, residual=True)
        block.training = unit.training
        stand_in = _Fused(OrderedDict({inner: block}))
    elif _is_unit(module):
        stand_in = DepthwiseGELUBN.of_parts(*module)
    else:
        return None
    stand_in.training = module.training
    stand_in.replaced = (module,)  # in a tuple, so that it is no submodule
    return stand_in


def _original(stand_in):
    """What `stand_in` replaced, with the parts and flags that it has now."""
    module, = stand_in.replaced
    unit, block = module, stand_in
    if isinstance(stand_in, _Fused):
        (inner, block), = stand_in._modules.items()
        unit = module._modules[inner]
    unit._modules.update(block._modules)
    unit.training, module.training = block.training, stand_in.training
    return module


def _is_unit(module):
    return type(module) is nn.Sequential and len(module) == 3 and not has_hooks(module) and cannot_fuse(*module) is None


def _only_child(module):
    """The name of a module's only child, where it has nothing else."""
    if module is None or isinstance(module, nn.Sequential) or len(module._modules) != 1 or module._parameters or module._buffers:
        return None
    return next(iter(module._modules))


def _adds_its_input(module, inner):
    """Whether its forward is x -> inner(x) + x: asked of the method itself, with a stand-in for `self`."""
    x = torch.tensor([1.0, 5.0])
    try:
        y = type(module).forward(types.SimpleNamespace(**{inner: lambda x: 2 * x + 1}), x)
    except Exception:  # it needs more than its child, so it does something else
        return False
    return isinstance(y, torch.Tensor) and torch.equal(y, 3 * x + 1)
