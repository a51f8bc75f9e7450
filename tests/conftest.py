"""What several tests share: the measure of equality between two networks, and where kernels run."""
import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # train.py, and the packages where they are not installed
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tiny tensors gain nothing from threads, and tests may run side by side

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: Triton's interpreter runs them on the CPU
from torch.nn import functional as F


def relative_error(got, want):
    """|got - want| / |want|, norms over the whole tensor."""
    return ((got - want).norm() / want.norm()).item()


def randomise(model, seed):
    """Move every scale, shift, bias and running statistic off its initial 1 or 0, where it would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture
def assert_same_network():
    """Give `model` the weights of `peer` through `load(model, state dict)`, then compare them as functions.

    Logits, every parameter's gradient and the running statistics, in eval and in train mode, agree to 1e-5 relative
    in fp32: some hundred roundings, which two orders of summation stay below and a wrong eps, padding or activation
    does not (test_the_measure_rejects_spoilt_networks). A gradient below 1e-6 of the whole is only required to be as
    small: a shift in front of a BatchNorm has none, and what is left there is rounding.
    """
    def check(model, peer, load, image_size=64, memory_format=torch.contiguous_format):
        randomise(peer, seed=1)
        peer.to(memory_format=memory_format)  # the same layout, so that a ReLU's edge falls on the same side
        load(model, copy.deepcopy(peer.state_dict()))
        x = torch.rand(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
        x = x.contiguous(memory_format=memory_format)
        y = torch.tensor([0, 1, 1, 0])
        for training in (False, True):  # eval first: training changes the running statistics
            logits, grads = [], []
            for m in (model, peer):
                m.train(training)
                m.zero_grad()
                out = m(x)
                F.cross_entropy(out, y).backward()
                logits.append(out.detach())
                grads.append({name: p.grad for name, p in m.named_parameters()})
            assert relative_error(*logits) <= 1e-5
            total = torch.stack([g.norm() for g in grads[1].values()]).norm()
            for (name, got), want in zip(grads[0].items(), grads[1].values(), strict=True):
                if want.ndim > got.ndim:  # a convolution's patches beside a matrix's: (D, C, P, P) -> (D, P * P * C)
                    want = want.permute(0, 2, 3, 1).flatten(1)
                if want.norm() < 1e-6 * total:
                    assert got.norm() < 1e-5 * total, name
                else:
                    assert relative_error(got, want) <= 1e-5, name
        for (name, got), (_, want) in zip(model.named_buffers(), peer.named_buffers(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)
    return check


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # float32 is judged as float32: the Triton kernels follow this switch


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def interpreter_as_a_gpu(monkeypatch):
    """Triton's interpreter keeps bfloat16 as raw bits, multiplies those, and cuts off where a GPU rounds to nearest; and
    calls Python's erf for each element, which takes most of the time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder
    dot = builder.create_dot

    def wide_dot(a, b, *rest):
        a, b = (builder.create_fp_ext(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b))
        return dot(a, b, *rest)
    monkeypatch.setattr(builder, "create_dot", wide_dot)
    fp_trunc = builder.create_fp_trunc

    def round_to_nearest(a, dtype):
        result = fp_trunc(a, dtype)
        if dtype.scalar == tl.bfloat16 and a.dtype.scalar == tl.float32:
            result.data = torch.from_numpy(a.data.copy()).bfloat16().view(torch.uint16).numpy()
        return result
    monkeypatch.setattr(builder, "create_fp_trunc", round_to_nearest)
    monkeypatch.setattr(builder, "create_erf", lambda a: TensorHandle(torch.from_numpy(a.data.copy()).erf().numpy(), a.dtype))
