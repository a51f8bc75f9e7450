"""Compile the Triton kernels for GPUs that need not be there. Print one JSON object per kernel.

python tests/helpers/compile_kernels.py sample       each kernel once
python tests/helpers/compile_kernels.py all 0 2      every case, the first of 2 halves
python tests/helpers/compile_kernels.py launches     the kernels that the launchers launch

It is a program because it needs a process without TRITON_INTERPRET.
"""
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from kernels import depthwise_launch, depthwise_triton

ONE_LAUNCH = "forward_kernel", "backward_kernel"
TWO_LAUNCHES = "moments_kernel", "apply_kernel", "sums_kernel", "gradients_kernel"
DTYPES = torch.float16, torch.bfloat16, torch.float32
CAPABILITIES = 80, 90, 100
IN_DTYPE_OF_X = "x_ptr", "w_ptr", "y_ptr", "dy_ptr", "dx_ptr", "z_ptr", "g_ptr"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def all_cases():
    """(kernel, side of the map, K, dtype, compute capability).

    The kernels of one launch in all combinations. Those of two launches are made of the same
    functions: each dtype, capability and map once.
    """
    for kernel, side, dtype, capability in itertools.product(
            ONE_LAUNCH, (8, 12, 16, 32), DTYPES, CAPABILITIES):
        yield kernel, side, 9, dtype, capability
    for kernel in TWO_LAUNCHES:
        for side, dtype, capability in zip((12, 32, 16), DTYPES, CAPABILITIES, strict=True):
            yield kernel, side, 9, dtype, capability
    for K in (3, 11):
        yield "backward_kernel", 12, K, torch.float16, 90
        yield "backward_kernel", 32, K, torch.float32, 80


def sampled_cases():
    """Each kernel once, each dtype, capability and map twice."""
    cases = itertools.cycle(zip((12, 32, 8), DTYPES, CAPABILITIES, strict=True))
    for kernel in (*ONE_LAUNCH, *TWO_LAUNCHES):
        side, dtype, capability = next(cases)
        yield kernel, side, 9, dtype, capability


def compile_for(kernel, side, K, dtype, capability):
    """The kernel as a launch at (250, 512, side, side) specialises it."""
    plan, options = depthwise_launch.tile((250, 512, side, side), K, dtype)
    function = getattr(depthwise_triton, kernel)
    type_of_x = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    constants = {"P": plan._replace(PRECISION="tf32x3"), "RESIDUAL": True}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = type_of_x if name in IN_DTYPE_OF_X else "*fp32"
        else:
            signature[name] = "fp32" if name in ("eps", "inverse_count") else "i32"
        if name.endswith("_ptr") or "stride" in name:
            attributes[i,] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(ASTSource(function, signature, constants, attributes),
                          target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled):
    """Registers per thread, bytes spilled, bytes of shared memory per program, tensor-core
    instructions in the PTX."""
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / f"{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin],
                            capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    instructions = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
                    if name in compiled.asm["ptx"]]
    return {"registers": int(registers), "spilled": int(stack) + int(local),
            "shared": compiled.metadata.shared, "tensor_cores": instructions}


class NoGPU:
    """A driver that names a GPU and has none. Triton specialises and compiles each launch."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def launches():
    """Names of the kernels that the launchers call, each compiled from its own arguments."""
    triton.runtime.driver.set_active(NoGPU())
    names = []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(**arguments):
                self.kernel.warmup(grid=grid, **arguments)
                names.append(self.kernel.fn.__name__)
            return launch
    for name in (*ONE_LAUNCH, *TWO_LAUNCHES):
        setattr(depthwise_triton, name, Compiled(getattr(depthwise_triton, name)))
    for N, C in ((250, 512), (5, 4)):  # enough channels for one launch, too few
        x, weight, c = (torch.zeros(N, C, 4, 4).half(), torch.zeros(C, 1, 3, 3).half(),
                        torch.zeros(C))
        _, mean, var = depthwise_launch.forward(x, weight, c, None, None, None, None, 1e-5, True)
        depthwise_launch.forward(x, weight, None, c, c, mean, var, 1e-5, False)
        depthwise_launch.backward(x, x, weight, c, None, mean, var, 1e-5, True, True)
    return names


def main(what, part=0, parts=1):
    if what == "launches":
        print(json.dumps(launches()))
        return
    cases = list(all_cases() if what == "all" else sampled_cases())
    for kernel, side, K, dtype, capability in cases[int(part)::int(parts)]:
        compiled = compile_for(kernel, side, K, dtype, capability)
        case = {"kernel": kernel, "map": side, "K": K, "capability": capability,
                "dtype": str(dtype).removeprefix("torch.")}
        print(json.dumps({**case, **resources(compiled)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
