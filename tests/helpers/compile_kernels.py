"""Compile the Triton kernels for GPUs that need not be there. Print one JSON object per kernel.

python tests/helpers/compile_kernels.py sample       some cases
python tests/helpers/compile_kernels.py all 0 2      every case, the first of two halves

It is a program because it needs a process without TRITON_INTERPRET. Each case has a process of its
own, since a compiler may die: then its line holds the exit code.
"""
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from kernels import depthwise_check
from kernels.depthwise_check import Case

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


def all_cases():
    """Each map with each kernel size in each dtype, the dtypes on different GPUs.

    One launch or two, and strides that 16 divides, as far as the map allows it, take turns, and so
    meet every kernel size, dtype and GPU.
    """
    for (m, (H, W)), (k, K), (d, dtype) in itertools.product(
            enumerate(MAPS), enumerate(KERNEL_SIZES), enumerate(DTYPES)):
        device, programs, C = TURNS[(7 * m + k + 4 * d) % len(TURNS)]
        yield Case((250, C, H, W), K, dtype, device, programs=programs)
    for side, dtype, device in itertools.product((8, 12, 16, 32), DTYPES, (*DEVICES, RTX)):
        yield Case((250, 512, side, side), 9, dtype, device, programs=1)  # some of them again


def sampled_cases():
    """The design's maps, and those that once killed the compiler or spilled."""
    yield Case((250, 512, 12, 12), 9, "float16", H100)
    yield Case((250, 512, 5, 5), 9, "float16", H100, programs=1)
    yield Case((250, 511, 7, 7), 3, "float32", H100, programs=2)
    yield Case((250, 512, 8, 8), 9, "bfloat16", B200)
    yield Case((64, 768, 32, 32), 7, "float16", A100)
    yield Case((64, 1536, 32, 32), 9, "float16", RTX)
    yield Case((250, 511, 5, 9), 5, "float32", A100, programs=1)
    yield Case((250, 511, 8, 8), 7, "bfloat16", H100, programs=2)
    yield Case((250, 511, 11, 11), 7, "float16", H100, programs=1)


def describe(started):
    """What one kernel takes."""
    ptx = started.compiled.asm["ptx"]
    tensor_cores = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx]
    return {"kernel": f"{started.kernel} {started.part}".strip(), "tensor_cores": tensor_cores,
            "windows": started.plan.BLOCK_M, **depthwise_check.resources(started.compiled)}


def in_its_own_process(case):
    """Print a line per kernel, or one with the exit code of the process that died."""
    pid = os.fork()
    if pid == 0:
        for started in depthwise_check.compile_case(case):
            print(json.dumps({**case._asdict(), **describe(started)}), flush=True)
        os._exit(0)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        print(json.dumps({**case._asdict(), "died": code}), flush=True)


def main(what, part=0, parts=1):
    cases = []
    for case in all_cases() if what == "all" else sampled_cases():
        if case not in cases:
            cases.append(case)
    for case in cases[int(part)::int(parts)]:
        in_its_own_process(case)


if __name__ == "__main__":
    main(*sys.argv[1:])
