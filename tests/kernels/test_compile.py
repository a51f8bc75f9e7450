"""The Triton kernels compile for the GPUs that they are for, with no GPU there: no spills, shared memory and tensor cores as
designed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = Path(__file__).parent.parent / "helpers" / "compile_kernels.py"
# bytes of shared memory that one program may take: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}, 100: {"mma.sync", "tcgen05.mma"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    return lambda *arguments: subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], env=environment, text=True,
                                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def compiled(start):
    parts = min(2, os.cpu_count())
    processes = [start(part, parts) for part in range(parts)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * parts, outputs
    return [json.loads(line) for output, _ in outputs for line in output.splitlines()]


def test_every_case_was_compiled(compiled):
    assert len(compiled) == 2 * 4 * 3 * 3 + 4 * 3 + 4


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
                    reason="tiles are sized for Triton 3.9; the assembler of 3.6 spills 8 to 96 bytes in nine of these cases")
def test_nothing_spills(compiled):
    assert not [case for case in compiled if case["spilled"]]


def test_shared_memory_fits(compiled):
    assert not [case for case in compiled if case["shared"] > SHARED_LIMIT[case["capability"]]]


def test_products_are_on_tensor_cores(compiled):
    """Every kernel has a conv in it. On Hopper, 16-bit products take the warp-group instructions."""
    for case in compiled:
        assert case["tensor_cores"] and set(case["tensor_cores"]) <= TENSOR_CORES[case["capability"]], case
        if case["capability"] == 90 and case["dtype"] != "float32":
            assert "wgmma.mma_async" in case["tensor_cores"], case


def test_one_launch_forward_and_one_backward(start):
    """From the launchers' own arguments. With too few channels to fill a GPU the work is split, in two launches each way."""
    process = start("launches")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output) == ["forward_kernel", "apply_kernel", "backward_kernel",
                                  "moments_kernel", "apply_kernel", "apply_kernel", "sums_kernel", "gradients_kernel"]
