"""Whether the Triton kernels work on this GPU, with this compiler.

A compiler can end its process with a segmentation fault, which no `except` catches. So the kernels
of a call are compiled in another process first, without a launch: that needs no GPU. Afterwards
they are in Triton's cache.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import depthwise_launch, reference

SECONDS = 600  # that compiling may take
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """What decides which code is compiled. x is (N, C, H, W) with contiguous maps."""
    shape: tuple[int, int, int, int]
    kernel_size: int
    dtype: str                             # "float16", "bfloat16" or "float32"
    device: tuple[int, int, str]            # depthwise_launch.Device
    strides: tuple[int, int] | None = None  # of samples and channels; None: contiguous
    allow_tf32: bool = False
    programs: int | None = None            # per channel; None: the launcher chooses
    knobs: dict = {}                       # instead of what the launcher chooses


class Started(NamedTuple):
    """One launch that did not happen."""
    kernel: str
    part: str                # what a kernel with several parts does in this launch
    grid: tuple[int, int]
    compiled: triton.compiler.CompiledKernel
    plan: tuple


class _NoGPU:
    """A driver of a GPU that is not there: Triton specialises and compiles each launch for it."""
    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # Triton keeps one cache of kernels per device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def compile_case(case: Case) -> list[Started]:
    """The kernels of a call: forward in training and in evaluation, then backward. Each once.

    Changes the driver of this process for good. Raises what the compiler raises.
    """
    triton.runtime.driver.set_active(_NoGPU(case.device[0]))
    torch.backends.cudnn.allow_tf32 = case.allow_tf32
    started = {}

    def start(kernel, grid, **arguments):
        compiled = kernel.warmup(grid=grid, **arguments)
        started[compiled.hash] = Started(kernel.fn.__name__, part_of(arguments), grid, compiled,
                                         arguments["P"])
    original, depthwise_launch.start = depthwise_launch.start, start
    try:
        N, C, H, W = case.shape
        stride_n, stride_c = case.strides or (C * H * W, H * W)
        dtype = getattr(torch, case.dtype)
        x = torch.empty_strided(case.shape, (stride_n, stride_c, W, 1), dtype=dtype)
        weight = torch.empty(C, 1, case.kernel_size, case.kernel_size, dtype=dtype)
        channel = torch.empty(C)
        options = dict(programs=case.programs, device=depthwise_launch.Device(*case.device),
                       **case.knobs)
        for stats in ((None, None), (channel, channel)):
            depthwise_launch.forward(x, weight, channel, channel, channel, *stats, 1e-5, True,
                                     **options)
        depthwise_launch.backward(x, x, weight, channel, channel, channel, channel, 1e-5, True,
                                  True, **options)
    finally:
        depthwise_launch.start = original
    return list(started.values())


def part_of(arguments):
    """"sums" or "gradients" of a backward pass in two launches, "moments" of a forward pass."""
    if "SUMS" in arguments and arguments["dx_ptr"] is None:
        return "sums"
    if arguments.get("SUMS") is False:
        return "gradients"
    return "moments" if arguments.get("y_ptr", "") is None else ""


def resources(compiled) -> dict[str, int]:
    """Registers per thread, bytes spilled per thread, bytes of shared memory and warps per program.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def report(tool, option):
            return subprocess.run([TOOLS / tool, option, cubin.name], capture_output=True,
                                  text=True, check=True).stdout
        usage = report("cuobjdump", "--dump-resource-usage")
        usage = dict(item.split(":") for item in usage.split() if item.count(":") == 1)
        spilled = int(usage["STACK"]) + int(usage["LOCAL"])
        if spilled and not re.search(r"\bLDL\b", report("nvdisasm", "-c")):
            spilled = 0  # a stack that no instruction reads
    return {"registers": int(usage["REG"]), "spilled": spilled,
            "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


def disagreement(results, expected) -> str | None:
    """The relative errors of the tensors, in words, if not all are below 1 %."""
    errors = [((got.float() - want.float()).norm() / want.float().norm()).item()
              for got, want in zip(results, expected, strict=True)]
    if all(error < 0.01 for error in errors):  # a NaN is not below either
        return None
    return "relative errors " + ", ".join(f"{error:.2g}" for error in errors)


def self_check(device: torch.device) -> str | None:
    """Compare the kernels with the reference on a GPU: what is wrong, in words, or None.

    No test runs on every GPU and compiler. So this check precedes their first use, and no user
    gets a wrong result.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=generator).to(device, torch.float16)
                     for shape in ((70, 4, 8, 8), (4, 1, 9, 9), (70, 4, 8, 8)))

    def run(forward, backward, x, weight, dy, **options):
        y, mean, var = forward(x, weight, None, None, None, None, None, 1e-5, True, **options)
        gradients = backward(dy, x, weight, None, None, mean, var, 1e-5, True, True, **options)
        return y, mean, var, *gradients

    expected = run(reference.forward, reference.backward, x.float(), weight.float(), dy.float())
    for programs in (1, 2):  # one launch each way, and two
        if device.type == "cuda" and (why_not := fails_here(x, weight.shape[-1], programs)):
            return why_not
        try:
            results = run(depthwise_launch.forward, depthwise_launch.backward, x, weight, dy,
                          programs=programs)
        except Exception as e:  # whatever a compiler or a driver can raise
            reason = "".join(str(e).strip().splitlines()[:1])
            return f"the Triton kernels fail on this GPU: {type(e).__name__}: {reason}"
        if difference := disagreement(results, expected):
            return f"the Triton kernels are wrong on this GPU ({difference})"
    return None


def fails_here(x, kernel_size: int, programs: int | None = None) -> str | None:
    """Why the kernels cannot run for x on its GPU, in words, or None.

    Compiles them once for all inputs that Triton specialises alike. `programs` as in the launcher.
    """
    N, C, H, W = x.shape
    device, strides = depthwise_launch.device_of(x), depthwise_launch.strides(x)
    S = programs or depthwise_launch.programs_per_channel(x.shape, x.dtype)
    numbers = N, triton.cdiv(N, S), *strides
    key = (device, H, W, kernel_size, x.dtype, torch.backends.cudnn.allow_tf32, S == 1,
           *((n == 1, n % 16 == 0) for n in numbers))
    if key not in _failures:
        _failures[key] = fails(Case(
            (N, C, H, W), kernel_size, str(x.dtype).removeprefix("torch."), device, strides,
            torch.backends.cudnn.allow_tf32, programs))
    return _failures[key]


_failures = {}


def fails(case: Case) -> str | None:
    """Why the kernels of a case cannot run, in words, or None. Compiles in another process."""
    largest_shared = case.device[1]
    root = Path(__file__).parents[len(__package__.split("."))]
    environment = {**os.environ, "TRITON_INTERPRET": "0",
                   "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    try:
        result = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(case._asdict())], capture_output=True,
            text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"compiling takes more than {SECONDS} seconds"
    if result.returncode < 0:
        return f"the compiler dies of {signal.Signals(-result.returncode).name}"
    if result.returncode:
        return f"compiling fails: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
    for kernel in map(json.loads, result.stdout.splitlines()):
        if kernel["shared"] > largest_shared:
            return (f"{kernel['kernel']} needs {kernel['shared']:,} bytes of shared memory and "
                    f"this GPU has {largest_shared:,}")
    return None


def main(case: str) -> None:
    for started in compile_case(Case(**json.loads(case))):
        print(json.dumps({"kernel": started.kernel, "shared": started.compiled.metadata.shared}))


if __name__ == "__main__":
    main(sys.argv[1])
