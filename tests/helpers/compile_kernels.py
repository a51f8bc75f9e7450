"""Compile the Triton kernels for GPUs that need not be there, and print what each takes, one JSON object a line.

python tests/compile_kernels.py PART PARTS        (a program of its own: TRITON_INTERPRET must be unset)
python tests/compile_kernels.py launches          instead, what the launchers launch
"""
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
TARGETS = 80, 90, 100
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cases():
    """(kernel, side of the map, K, dtype, compute capability): the first two for all; the others for each dtype, capability
    and map once, since they are made of the same functions."""
    for kernel in ONE_LAUNCH:
        for side in (8, 12, 16, 32):
            for dtype in DTYPES:
                for capability in TARGETS:
                    yield kernel, side, 9, dtype, capability
    for kernel in TWO_LAUNCHES:
        for dtype, capability, side in zip(DTYPES, TARGETS, (12, 32, 16)):
            yield kernel, side, 9, dtype, capability
    for K in (3, 11):
        yield "backward_kernel", 12, K, torch.float16, 90
        yield "backward_kernel", 32, K, torch.float32, 80


def compile_for(kernel, side, K, dtype, capability):
    """The kernel as a launch at (250, 512, side, side) specialises it."""
    cut, options, _ = depthwise_launch.plan((250, 512, side, side), K, dtype)
    function = getattr(depthwise_triton, kernel)
    of_x = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature, constants, attributes = {}, {"P": cut._replace(PRECISION="tf32x3"), "RESIDUAL": True}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = of_x if name in ("x_ptr", "w_ptr", "y_ptr", "dy_ptr", "dx_ptr", "z_ptr", "g_ptr") else "*fp32"
        else:
            signature[name] = "fp32" if name in ("eps", "batch_share") else "i32"
        if name.endswith("_ptr") or "stride" in name:
            attributes[i,] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, cubin):
    """Registers a thread, bytes spilled, shared memory a program in bytes, and the tensor-core instructions in the PTX."""
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    found = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in compiled.asm["ptx"]]
    return {"registers": int(registers), "spilled": int(stack) + int(local), "shared": compiled.metadata.shared, "tensor_cores": found}


class NoGPU:
    """A driver that names a GPU and has none: enough for Triton to specialise and compile what is launched."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def launches():
    """Names of the kernels that the launchers call, each compiled from their own arguments."""
    triton.runtime.driver.set_active(NoGPU())
    names = []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                self.kernel.warmup(*args, grid=grid, **options)
                names.append(self.kernel.fn.__name__)
            return launch
    for name in (*ONE_LAUNCH, *TWO_LAUNCHES):
        setattr(depthwise_launch, name, Compiled(getattr(depthwise_triton, name)))
    for N, C in ((250, 512), (5, 4)):  # enough channels for one launch, too few
        x, weight, c = torch.zeros(N, C, 8, 8).half(), torch.zeros(C, 1, 9, 9).half(), torch.zeros(C)
        _, mean, var = depthwise_launch.forward(x, weight, c, None, None, None, None, 1e-5, True)
        depthwise_launch.forward(x, weight, None, c, c, mean, var, 1e-5, False)
        depthwise_launch.backward(x, x, weight, c, None, mean, var, 1e-5, True, True)
    return names


if __name__ == "__main__":
    if sys.argv[1] == "launches":
        print(json.dumps(launches()))
        sys.exit()
    part, parts = map(int, sys.argv[1:])
    for kernel, side, K, dtype, capability in list(cases())[part::parts]:
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / f"part{part}.cubin"
        compiled = compile_for(kernel, side, K, dtype, capability)
        print(json.dumps({"kernel": kernel, "map": side, "K": K, "dtype": str(dtype).removeprefix("torch."),
                          "capability": capability, **resources(compiled, cubin)}), flush=True)
