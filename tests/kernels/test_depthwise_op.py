"""The operator as PyTorch sees it: gradients, registrations, autocast, compile, what it saves."""
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import depthwise_cpu, depthwise_gelu_bn, depthwise_op, reference, why_not_triton
from tests.helpers.units import DEVICE, make_unit, run, saved_bytes


def as_op(unit, wrt=("x", "weight", "bias", "gamma", "beta")):
    """The unit through depthwise_gelu_bn: (y, {name: gradient})."""
    tensors = {name: getattr(unit, name) for name in ("x", "weight", "bias", "gamma", "beta")}
    leaves = {name: t.detach().clone().requires_grad_(name in wrt)
              for name, t in tensors.items() if t is not None}
    y, _, _ = depthwise_gelu_bn(**{**tensors, **leaves}, mean=unit.mean, var=unit.var,
                                eps=unit.eps, residual=unit.residual)
    y.backward(unit.dy.to(y.dtype))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.fixture(params=["own", "reference", "triton"])
def through(request, monkeypatch):
    """The implementation of this device, the reference, and Triton's, which is interpreted without
    a GPU."""
    if request.param == "reference":
        monkeypatch.setattr(depthwise_op, "implementation", lambda *args: reference)
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        from kernels import depthwise_launch
        monkeypatch.setattr(depthwise_op, "implementation", lambda *args: depthwise_launch)
    return request.param


@pytest.mark.parametrize("options", [{}, dict(fixed_stats=True), dict(bare=True, residual=False)],
                         ids=["batch", "fixed", "bare"])
def test_gradients_reach_every_input(through, options):
    unit = make_unit(2, 2, 4, 5, 3, **options, device=DEVICE)
    y, gradients = as_op(unit)
    want = run(reference, unit)
    torch.testing.assert_close(y, want["y"], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want["d" + name], rtol=1e-4, atol=1e-4, msg=name)
    _, some = as_op(unit, wrt=("weight",))
    assert torch.equal(some["weight"], gradients["weight"]) and some["x"] is None


def test_opcheck(through):
    ops = torch.ops.vit_convmixer
    unit = make_unit(1, 2, 4, 5, 3, device=DEVICE)
    mean, var = unit.bias, unit.gamma.abs()
    for op, *arguments in (
            (ops.depthwise_gelu_bn, *unit[:5], None, None, 1e-5, True),
            (ops.depthwise_gelu_bn, *unit[:2], None, None, None, mean, var, 1e-5, False),
            (ops.depthwise_gelu_bn_backward, unit.dy, *unit[:4], mean, var, 1e-5, True, True)):
        torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_conv_does(through, dtype):
    """float32 in, low precision out; with the residual float32 out, as fn(x) + x gives, and x is
    not rounded."""
    unit = make_unit(2, 1, 4, 5, 3, device=DEVICE)
    low = unit._replace(x=unit.x.to(dtype), weight=unit.weight.to(dtype),
                        bias=unit.bias.to(dtype), residual=False)
    with torch.autocast(DEVICE, dtype):
        y, gradients = as_op(unit._replace(residual=False))
        with_residual, _ = as_op(unit)
    assert y.dtype == dtype and with_residual.dtype == torch.float32
    assert torch.equal(with_residual, y + unit.x)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert torch.equal(y, as_op(low)[0])


def test_two_backwards_and_no_second_derivative():
    unit = make_unit(3, 2, 8, 8, 5, device=DEVICE)
    leaves = [t.requires_grad_() for t in unit[:5]]
    y = depthwise_gelu_bn(*leaves)[0]
    first, second = (torch.autograd.grad(y, leaves, unit.dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gradient, = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("residual", [False, True])
def test_one_activation_is_saved_instead_of_three(residual):
    unit = make_unit(4, 8, 8, 8, 3, device=DEVICE)
    leaves = [t.requires_grad_() for t in unit[:5]]
    activation = unit.x.nbytes
    _, fused = saved_bytes(lambda: depthwise_gelu_bn(*leaves, residual=residual), activation)
    _, plain = saved_bytes(lambda: reference.forward(*leaves, None, None, 1e-5, residual),
                           activation)
    assert fused == activation and plain == 3 * activation


def test_flops_are_those_of_the_convs():
    unit = make_unit(3, 2, 8, 8, 5, device=DEVICE)
    leaves = [t.detach().clone().requires_grad_() for t in unit[:5]]
    with FlopCounterMode(display=False) as plain:
        reference.forward(*leaves, None, None, 1e-5, False)
    with FlopCounterMode(display=False) as fused:
        y = depthwise_gelu_bn(*leaves)[0]
    assert fused.get_total_flops() == plain.get_total_flops() == 2 * unit.x.numel() * 25
    # PyTorch's own count of a grouped conv's backward forgets the groups.
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * fused.get_total_flops()


def test_wrong_calls():
    x, weight, c = torch.ones(2, 3, 4, 4), torch.ones(3, 1, 3, 3), torch.ones(3)
    for arguments, message in [
        *(((x, wrong), r"x \(2, 3, 4, 4\), weight .* are not") for wrong in (
            weight[:2], weight.expand(3, 3, 3, 3), weight[..., :2], torch.ones(3, 1, 4, 4))),
        ((x[0], weight), r"x \(3, 4, 4\), .* are not"),
        ((x, weight, c[:2]), r"bias, gamma, .* \[\(2,\), None, .*\(C,\) or None"),
        ((x, weight, c, c, c, c), r"\(3,\), None\] are not"),
        ((x[:1, :, :1, :1], weight), "more than one value per channel"),
        ((x[:0], weight, c, c, c, c, c), "an empty batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            depthwise_gelu_bn(*arguments)


def test_the_implementation_follows_device_and_shape(monkeypatch, recwarn):
    """As for a GPU, which may be absent. What no kernel takes falls back, and a warning says so."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernels import depthwise_launch
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(depthwise_launch, "limits_of", lambda _: depthwise_launch.GPULimits())
    monkeypatch.setattr(depthwise_op, "why_not_triton", lambda device: None)

    choose = depthwise_op.implementation.__wrapped__  # without its cache
    small, wide = torch.Size((2, 3, 8, 8)), torch.Size((2, 3, 200, 200))
    assert choose(gpu, small, 9, torch.float16) is depthwise_launch
    assert choose(cpu, wide, 9, torch.float16) is depthwise_cpu and not recwarn.list
    assert why_not_triton(cpu) == "Triton kernels need a CUDA device, and this is cpu"
    assert choose(gpu, wide, 9, torch.float32) is reference
    assert ["no Triton kernel takes" in str(w.message) for w in recwarn.list] == [True]
    monkeypatch.setattr(depthwise_op, "why_not_triton", lambda device: "it is wrong here")
    assert choose(gpu, small, 5, torch.float16) is reference
    assert "it is wrong here" in str(recwarn.list[-1].message)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_cuda_graph_and_grad_scaler():
    unit = make_unit(8, 128, 8, 8, 9, device=DEVICE)
    leaves = [t.requires_grad_() for t in unit[:5]]
    scaler = torch.amp.GradScaler(DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.float16):
            y = depthwise_gelu_bn(*leaves, residual=True)[0]
        return y, torch.autograd.grad(scaler.scale(y.float().square().mean()), leaves)
    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_devices_and_dtypes_are_those_of_a_conv():
    """What plain PyTorch refuses is refused, with its type of error."""
    x, weight, c = torch.ones(2, 3, 4, 4), torch.ones(3, 1, 3, 3), torch.ones(3)
    for arguments in [(x, weight.to("meta")), (x.to("meta"), weight), (x, weight, c.to("meta")),
                      (x.long(), weight), (x.byte(), weight), (x.half(), weight),
                      (x, weight.double()), (x, weight, c.bfloat16())]:
        with pytest.raises(RuntimeError):
            depthwise_gelu_bn(*arguments)
    with pytest.raises(RuntimeError, match="on one device"):
        depthwise_gelu_bn(x, weight, gamma=c.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_gelu_bn(x, weight.double(), c)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("fixed_stats", [False, True], ids=["train", "eval"])
def test_every_memory_format_of_every_tensor(through, fixed_stats):
    unit = make_unit(2, 4, 4, 5, 3, device=DEVICE, fixed_stats=fixed_stats)
    want, gradients = as_op(unit)
    formats = torch.contiguous_format, torch.channels_last
    some = list(itertools.product(formats, repeat=3))
    for x, weight, dy in some[-1:] if through == "triton" else some:  # interpreted, it is slow
        other = unit._replace(x=unit.x.to(memory_format=x), dy=unit.dy.to(memory_format=dy),
                              weight=unit.weight.to(memory_format=weight))
        y, got = as_op(other)
        assert y.is_contiguous(memory_format=x) and got["x"].is_contiguous(memory_format=x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4, msg=name)
