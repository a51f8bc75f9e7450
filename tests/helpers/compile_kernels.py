"""Compile the Triton kernels for GPUs that need not be there. Print one JSON object per kernel.

python tests/helpers/compile_kernels.py sample       some cases
python tests/helpers/compile_kernels.py all 0 2      every case, the first of two halves

It is a program because it needs a process without TRITON_INTERPRET. Each case has a process of its
own, since a compiler may die: then its line holds the exit code.
"""
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import depthwise_launch, depthwise_triton
from mixer.bench.unit import SHAPES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAPS = [(8, 8), (12, 12), (16, 16), (32, 32), (1, 1), (1, 6), (2, 2), (3, 3), (5, 5), (5, 9),
        (6, 6), (7, 5), (7, 7), (9, 9), (10, 10), (11, 11), (13, 13), (14, 14), (15, 16), (28, 28),
        (31, 17)]
KERNEL_SIZES = 1, 3, 5, 7, 9, 11
DTYPES = "float16", "bfloat16", "float32"
# compute capability, bytes of shared memory that one program may take: CUDA C++ Programming Guide,
# table "Technical Specifications per Compute Capability"
DEVICES = (80, 163 * 1024), (90, 227 * 1024), (100, 227 * 1024)
A100, H100, B200 = DEVICES
RTX = 89, 99 * 1024
TURNS = list(itertools.product(DEVICES, (1, 2), (512, 511)))


class CompileCase(NamedTuple):
    """What decides which code is compiled."""
    shape: tuple[int, int, int, int]  # of x, (N, C, H, W)
    kernel_size: int
    dtype: str
    device: tuple[int, int]
    programs: int | None = None       # per channel; None: the launcher chooses


TABLE = [CompileCase((N, C, side, side), K, "float16", H100) for N, C, side, K in SHAPES["cuda"]]


def all_cases():
    """Each map with each kernel size in each dtype, the dtypes on different GPUs. One launch or
    two, and strides that 16 divides, as far as the map allows it, take turns, and so meet every
    kernel size, dtype and GPU."""
    yield from TABLE
    for (m, (H, W)), (k, K), (d, dtype) in itertools.product(
            enumerate(MAPS), enumerate(KERNEL_SIZES), enumerate(DTYPES)):
        device, programs, C = TURNS[(7 * m + k + 4 * d) % len(TURNS)]
        yield CompileCase((250, C, H, W), K, dtype, device, programs)
    for side, dtype, device in itertools.product((8, 12, 16, 32), DTYPES, (*DEVICES, RTX)):
        yield CompileCase((250, 512, side, side), 9, dtype, device, 1)  # some of them again


def sampled_cases():
    """The design's maps, and those that once killed the compiler or spilled."""
    yield from TABLE
    yield CompileCase((250, 512, 5, 5), 9, "float16", H100, 1)
    yield CompileCase((250, 511, 7, 7), 3, "float32", H100, 2)
    yield CompileCase((250, 512, 8, 8), 9, "bfloat16", B200)
    yield CompileCase((64, 768, 32, 32), 7, "float16", A100)
    yield CompileCase((64, 1536, 32, 32), 9, "float16", RTX)
    yield CompileCase((250, 511, 5, 9), 5, "float32", A100, 1)
    yield CompileCase((250, 511, 8, 8), 7, "bfloat16", H100, 2)
    yield CompileCase((250, 511, 11, 11), 7, "float16", H100, 1)


class NotLaunched:
    """A kernel that is compiled where it would be launched: {hash: (name, tiling, compiled)}."""
    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def compile(**arguments):
            part = ""
            if arguments.get("MOMENTS", arguments.get("SUMS")) is False:
                part = " apply" if "MOMENTS" in arguments else " gradients"
            elif arguments.get("y_ptr", arguments.get("dx_ptr")) is None:
                part = " moments" if "MOMENTS" in arguments else " sums"
            compiled = self.kernel.warmup(grid=grid, **arguments)
            name = self.kernel.fn.__name__ + part
            self.compiled[compiled.hash] = name, arguments["META"], compiled
        return compile


def compile_case(case):
    """The kernels of a call, (name and part, tiling, compiled) each: forward in training and in
    evaluation, then backward. Changes this process for good."""
    capability, shared_bytes = case.device
    triton.runtime.driver.set_active(SimpleNamespace(  # of a GPU that is not there
        get_current_device=lambda: 0, get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32)))
    limits = depthwise_launch.GPULimits(capability, shared_bytes)
    depthwise_launch.limits_of = lambda device: limits
    compiled = {}
    depthwise_launch.kernels = SimpleNamespace(
        Tiling=depthwise_triton.Tiling,
        **{name: NotLaunched(getattr(depthwise_triton, name), compiled)
           for name in ("forward_kernel", "backward_kernel")})

    _, C, _, _ = case.shape
    x = torch.empty(case.shape, dtype=getattr(torch, case.dtype))
    weight = torch.empty(C, 1, case.kernel_size, case.kernel_size, dtype=x.dtype)
    channel = torch.empty(C)
    for stats in ((None, None), (channel, channel)):
        depthwise_launch.forward(x, weight, channel, channel, channel, *stats, 1e-5, True,
                                 programs=case.programs)
    depthwise_launch.backward(x, x, weight, channel, channel, channel, channel, 1e-5, True, True,
                              programs=case.programs)
    return compiled.values()


def describe(name, tiling, compiled):
    """What one kernel takes: registers and spilled bytes of a thread, shared bytes of a program."""
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
    products = "mma.sync", "wgmma.mma_async", "tcgen05.mma"
    return {"kernel": name, "windows": tiling.BLOCK_M, "registers": int(usage["REG"]),
            "spilled": spilled, "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "tensor_cores": [name for name in products if name in compiled.asm["ptx"]]}


def in_its_own_process(case):
    """Print a line per kernel, or one with the exit code of the process that died."""
    pid = os.fork()
    if pid == 0:
        for compiled in compile_case(case):
            print(json.dumps({**case._asdict(), **describe(*compiled)}), flush=True)
        os._exit(0)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        print(json.dumps({**case._asdict(), "died": code}), flush=True)


def main(what, part=0, parts=1):
    cases = dict.fromkeys(all_cases() if what == "all" else sampled_cases())
    for case in list(cases)[int(part)::int(parts)]:
        in_its_own_process(case)


if __name__ == "__main__":
    main(*sys.argv[1:])
