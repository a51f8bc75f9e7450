"""Where the kernels run: on a GPU, or in Triton's interpreter; and what shows their mistakes."""
import importlib.util
import os

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # float32 is judged as float32: the kernels follow it


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def counted(monkeypatch):
    """counted(module, *names) -> a list that gets the name of each of these functions of the module
    when it is called."""
    def plan(module, *names):
        calls = []
        for name in names:
            function = getattr(module, name)

            def count(*args, name=name, function=function, **options):
                calls.append(name)
                return function(*args, **options)
            monkeypatch.setattr(module, name, count)
        return calls
    return plan


@pytest.fixture(autouse=True)
def interpreter_as_a_gpu(monkeypatch):
    """Mend Triton's interpreter where it differs from a GPU: it keeps bfloat16 as raw bits,
    multiplies those, and cuts off where a GPU rounds to nearest."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_builder as builder

    dot = builder.create_dot

    def wide_dot(a, b, *rest):
        wide = [builder.create_fp_ext(t, tl.float32) if t.dtype == tl.bfloat16 else t
                for t in (a, b)]
        return dot(*wide, *rest)
    monkeypatch.setattr(builder, "create_dot", wide_dot)

    fp_trunc = builder.create_fp_trunc

    def round_to_nearest(a, dtype):
        result = fp_trunc(a, dtype)
        if dtype.scalar == tl.bfloat16 and a.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(a.data.copy()).bfloat16()
            result.data = rounded.view(torch.uint16).numpy()
        return result
    monkeypatch.setattr(builder, "create_fp_trunc", round_to_nearest)
