"""One unit with its inputs, its float64 results, and a measure of an implementation's error."""
from typing import NamedTuple

import torch
from torch.nn import functional as F

from kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "mean", "var", "dx", "dweight", "dbias", "dgamma", "dbeta")


class Unit(NamedTuple):
    """Arguments of depthwise_gelu_bn, and the gradient dy of y."""
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    eps: float
    residual: bool
    dy: torch.Tensor

    def map(self, f):
        return Unit(*(f(t) if isinstance(t, torch.Tensor) else t for t in self))


def make_unit(N, C, H, W, K, dtype=torch.float32, *, residual=True, fixed_stats=False, bare=False,
               scale=1.0, device="cpu"):
    """A random unit, each tensor from its own seed. fixed_stats: mean and var are arguments; bare:
    no bias, gamma and beta; scale: of x."""
    def randn(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    bias = randn(3, C).to(dtype).float()  # a bias that float16 holds: eager PyTorch rounds it
    parameters = (None, None, None) if bare else (bias, randn(4, C) + 1.5, randn(5, C))
    stats = (randn(6, C) * 0.1, randn(7, C).abs() + 0.5) if fixed_stats else (None, None)
    unit = Unit(scale * randn(1, N, C, H, W).to(dtype), (randn(2, C, 1, K, K) / K).to(dtype),
                *parameters, *stats, 1e-5, residual, randn(8, N, C, H, W).to(dtype))
    return unit.map(lambda t: t.to(device))


def run(implementation, unit):
    """{name: result} of an implementation's two functions, without those of absent parameters. y
    and dx are in the dtype and layout of x, as the operator returns them."""
    y, mean, var = implementation.forward(*unit[:-1])
    dx, *gradients = implementation.backward(unit.dy, *unit[:4], mean, var, unit.eps,
                                             unit.residual, unit.mean is None)
    y, dx = (reference.restore_layout(t, unit.x) for t in (y, dx))
    return only_present(unit, (y, mean, var, dx, *gradients))


def by_autograd(unit):
    """{name: result} of plain PyTorch in the unit's own dtype."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in unit[:5]]
    y, mean, var = reference.forward(*leaves, *unit[5:-1])
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None],
                                         unit.dy.to(y.dtype)))
    gradients = [None if t is None else next(gradients) for t in leaves]
    return only_present(unit, (y, mean, var, *gradients))


def saved_bytes(function, least):
    """(its result, bytes that autograd saves for it in tensors of at least `least` bytes)."""
    saved = {}

    def save(t):
        return saved.setdefault(t.data_ptr(), t)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        result = function()
    return result, sum(t.nbytes for t in saved.values() if t.nbytes >= least)


def only_present(unit, results):
    absent = {f"d{name}" for name in ("bias", "gamma", "beta") if getattr(unit, name) is None}
    return {name: t.detach() for name, t in zip(NAMES, results, strict=True) if name not in absent}


def exact(unit):
    return by_autograd(unit.map(lambda t: t.double()))


def size_of_sums(unit):
    """{name: (largest sum of absolute terms, largest root of their sum of squares)} of each sum.
    Adding in float32 moves a sum by eps times the first at most. Terms that were rounded to the
    dtype of x, as plain PyTorch's are, make it wander by eps of that dtype times the second."""
    b = unit.map(lambda t: t.double())
    C, K, n = b.x.shape[1], b.weight.shape[-1], b.x.numel() // b.x.shape[1]
    channel = (1, C, 1, 1)
    z = F.conv2d(b.x, b.weight, b.bias, padding=K // 2, groups=C).requires_grad_()
    g = F.gelu(z)
    var, mean = torch.var_mean(g, (0, 2, 3), unbiased=False)
    if b.mean is not None:
        mean, var = b.mean, b.var
    centred = g - mean.view(channel)
    xhat = centred * torch.rsqrt(var + b.eps).view(channel)
    dz, = torch.autograd.grad(xhat, z, b.dy * (1.0 if b.gamma is None else b.gamma.view(channel)))

    def dweight(dz, x):
        return torch.ops.aten.convolution_backward(
            dz, x, b.weight, [C], [1, 1], [K // 2, K // 2], [1, 1], False, [0, 0], C,
            [False, True, False])[1]
    terms = {"mean": g / n, "var": centred.square() / n, "dbias": dz, "dgamma": b.dy * xhat,
             "dbeta": b.dy}
    sums = {name: (t.abs().sum((0, 2, 3)), t.square().sum((0, 2, 3)).sqrt())
            for name, t in terms.items()}
    sums["dweight"] = dweight(dz.abs(), b.x.abs()), dweight(dz.square(), b.x.square()).sqrt()
    return {name: (first.max().item(), second.max().item())
            for name, (first, second) in sums.items()}


def too_far(results, unit):
    """Which results have more than twice the error of plain PyTorch in the same dtype. One sentence
    each. The error is the largest difference from float64 on the same inputs. PyTorch's own error
    can be small by luck, where there are few elements, and its sums on the CPU are in double. So
    one rounding of the result, or of each term of a sum, is not too far."""
    plain, want, sums = by_autograd(unit), exact(unit), size_of_sums(unit)
    assert results.keys() == want.keys()
    problems = []
    for name, t in results.items():
        if t.shape != want[name].shape or not t.isfinite().all():
            problems.append(f"{name} is {tuple(t.shape)}, {(~t.isfinite()).sum()} not finite")
            continue
        floor = torch.finfo(t.dtype).eps * want[name].abs().max().item()
        if name in sums:
            floor = (torch.finfo(torch.float32).eps * sums[name][0]
                     + torch.finfo(unit.x.dtype).eps * sums[name][1])
        error, plain_error = ((r.double() - want[name]).abs().max().item()
                              for r in (t, plain[name]))
        if error > 2 * plain_error + floor:
            problems.append(f"{name} is off by {error:.1e}, plain PyTorch by {plain_error:.1e}, "
                            f"a rounding is {floor:.1e}")
    return problems
