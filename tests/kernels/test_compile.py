"""The Triton kernels compile for GPUs that are not there, without spills, with shared memory and
tensor cores as designed: by default each kernel once, every case with -m campaign."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from tests.helpers import compile_kernels

pytestmark = pytest.mark.faults
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
TENSOR_CORES = {80: {"mma.sync"}, 89: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"},
                100: {"mma.sync", "tcgen05.mma"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(*arguments) -> a process of compile_kernels.py."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
                   "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return lambda *arguments: subprocess.Popen(
        [sys.executable, compile_kernels.__file__, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module", params=["sample", pytest.param("all", marks=pytest.mark.campaign)])
def compiled(start, request):
    """What each kernel of each case takes, or how its compiler died."""
    processes = [start(request.param, str(part), "2") for part in range(2)]
    with ThreadPoolExecutor() as threads:  # one that nobody reads from stops when its pipe is full
        outputs = list(threads.map(subprocess.Popen.communicate, processes))
    assert not any(process.returncode for process in processes), outputs
    cases = [json.loads(line) for output, _ in outputs for line in output.splitlines()]
    assert len(cases) > (1000 if request.param == "all" else 15)
    return cases


def test_the_compiler_never_dies(compiled):
    """It did, where maps have an odd number of elements."""
    assert not [case for case in compiled if "died" in case]


@pytest.mark.skipif(TRITON < (3, 8), reason="tiles are sized for Triton 3.8")
def test_nothing_spills(compiled):
    """But for ten numbers of a thread, where a window has 512 elements (28x28 at K = 11, 32x32 at
    K = 9, backward on sm_90): two programs on an SM are worth more. Elsewhere it is two at most."""
    for case in compiled:
        H, W = case["shape"][2:]
        long_window = case["device"][0] == 90 and H * W >= 784 and case["kernel_size"] >= 9
        assert case["spilled"] <= (40 if long_window else 8), case


def test_shared_memory_fits(compiled):
    assert not [case for case in compiled if case["shared"] > case["device"][1]]


def test_two_programs_fit_on_an_sm(compiled):
    """At the shapes of the table. An SM of an H200 has 2^16 registers, which a warp takes by 256,
    and 228 KiB of shared memory, of which each program takes one more."""
    table = {(case.shape, case.kernel_size) for case in compile_kernels.TABLE}
    cases = [case for case in compiled if case["device"][0] == 90 and case["dtype"] == "float16"
             and (tuple(case["shape"]), case["kernel_size"]) in table]
    assert len({(*case["shape"], case["kernel_size"]) for case in cases}) == len(table)
    for case in cases:
        registers = -(-case["registers"] * 32 // 256) * 256 * case["warps"]
        assert 2 * registers <= 2**16 and 2 * (case["shared"] + 1024) <= 228 * 1024, case


def test_products_are_on_tensor_cores(compiled):
    """Every kernel has a conv in it. On Hopper, 16-bit products take the warp-group instructions,
    which need 64 rows: a conv of 32 windows, all that such sums have, does without."""
    for case in compiled:
        instructions = set(case["tensor_cores"])
        assert instructions and instructions <= TENSOR_CORES[case["device"][0]], case
        few_rows = case["kernel"] == "backward_kernel sums" and case["windows"] < 64
        if case["device"][0] == 90 and case["dtype"] != "float32" and not few_rows:
            assert "wgmma.mma_async" in instructions, case


def test_one_launch_forward_and_one_backward(compiled):
    """With too few channels to fill a GPU, or long ones, the work is split: two each way."""
    kernels = {}
    for case in compiled:
        kernels.setdefault(str([case[name] for name in case][:5]), []).append(case["kernel"])
    assert set(map(tuple, kernels.values())) == {
        ("forward_kernel", "forward_kernel apply", "backward_kernel"),
        ("forward_kernel moments", "forward_kernel apply", "backward_kernel sums",
         "backward_kernel gradients")}
