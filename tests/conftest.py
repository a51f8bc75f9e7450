"""What several tests share: the measure of equality between two networks, and where kernels run."""
import copy
import json
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

import numpy as np
from tests.helpers.commands import Command
from PIL import Image


def pytest_configure(config):
    config.addinivalue_line("markers", "campaign: the same faults by the thousand, for a quarter of an hour; runs with -m campaign alone")


def pytest_collection_modifyitems(config, items):
    if "campaign" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]


@pytest.fixture
def tally(record_property):
    """tally(kind, tried=.., survived=..): counts for the end of the test run; what is neither survived nor refused is lost."""
    def count(kind, tried, survived):
        record_property("fault", [kind, tried, survived, tried - survived])
        assert survived == tried, f"{tried - survived} of {tried} lost: {kind}"
    return count


def pytest_runtest_logreport(report):
    if report.when == "call":
        for name, value in report.user_properties:
            if name == "fault":
                FAULTS.append(value)
            elif name == "note":
                NOTES.append(value)


NOTES = []
FAULTS = []  # [kind, tried, survived, lost]; with pytest-xdist, those of all workers come together in the first process


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        total = [sum(numbers) for numbers in zip(*(fault[1:] for fault in FAULTS))]
        terminalreporter.section("faults: tried, survived, lost")
        for kind, *numbers in sorted(FAULTS) + [["all", *total]]:
            terminalreporter.write_line(f"{numbers[0]:>7,} {numbers[1]:>7,} {numbers[2]:>5,}  {kind}")
        if "FAULTS" in os.environ:  # the json file to keep these counts in
            path = Path(os.environ["FAULTS"])
            rows = {row["kind"]: row for row in (json.loads(path.read_text()) if path.exists() else [])}  # those not tried now stay
            rows |= {fault[0]: dict(zip(("kind", "tried", "survived", "lost"), fault)) for fault in FAULTS}
            path.write_text(json.dumps(sorted(rows.values(), key=lambda row: row["kind"]), indent=1) + "\n")
    for note in NOTES:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Forty noisy pictures in Kaggle's flat layout, cats bright above and dogs below."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        pixels[slice(0, 16) if i % 2 else slice(16, 32)] += 100
        Image.fromarray(pixels).save(root / f"{'cat' if i % 2 else 'dog'}.{i}.png")
    return root


@pytest.fixture
def command(tmp_path):
    """command(script, *arguments, ...) -> a Command, with a cache of the test's own; what still runs at the end is killed."""
    started = []

    def start(script, *arguments, env=None, **options):
        started.append(Command(script, arguments, tmp_path / "streams", {"XDG_CACHE_HOME": str(tmp_path / "cache"), **(env or {})}, **options))
        return started[-1]
    yield start
    for process in started:
        if process.code() is None:
            process.send(9)
            process.wait()


@pytest.fixture
def train(command):
    """train(*arguments) -> train.py's finished process; train.start(*arguments) -> one that runs."""
    def run(*arguments, **options):
        return command("train.py", *arguments, **options).wait()
    run.start = lambda *arguments, **options: command("train.py", *arguments, **options)
    return run


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
