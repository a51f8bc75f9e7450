"""The Triton kernels without a GPU: what their machine code takes, and an estimate of their time.

Each kernel is compiled as the launcher would launch it, and its instructions are counted: those of
a loop times its iterations, which follow from the plan. No line here is a measurement of time.
"""
import ast
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..experiments import Row
from ..report.measurements import Instructions, LaunchEstimate
from ..runtime.processes import attempt
from .block import SHAPES, Shape
from .measure import announce


class GPU(NamedTuple):
    """Sizes and rates of a GPU, from its maker's documents; clock and L2 rate are assumptions."""
    name: str
    sms: int
    ghz: float            # under load
    l2_mb: float
    l2_gb_s: float
    dram_gb_s: float
    tensor_tflops: float  # dense float16 products
    shared_kb: int        # of an SM


GPUS = {80: GPU("A100", 108, 1.3, 40, 3500, 2000, 312, 164),
        90: GPU("H200", 132, 1.7, 50, 5500, 4300, 990, 228),
        100: GPU("B200", 148, 1.8, 126, 9000, 7200, 2250, 228)}

# An SM has 4 partitions. Each issues one instruction of a warp (32 threads) per cycle.
PARTITIONS = 4
CYCLES = {"fma": 1, "imad": 2, "alu": 2, "special": 8, "memory": 4, "none": 0}  # in its pipe
PIPES = [  # (kind, pipe, opcodes); what matches first
    ("fma", "fma", "FFMA|FADD|FMUL|HADD2|HFMA2|HMUL2"),
    ("imad", "fma", "IMAD"),
    ("special", "special", "MUFU"),
    ("memory", "memory", "SHFL|LDS|STS|LDG|STG"),
    ("none", "none", "U|BAR|DEPBAR|BRA|H?GMMA|HMMA|WARP|LD|R2UR|S2R|MEMBAR|FENCE|BS|EXIT"),
    ("alu", "alu", ""),
]
ISSUE_RATE = 0.8          # of the peak, with several programs on an SM
ISSUE_RATE_ALONE = 0.5    # of a program alone, per warp of a partition, at most ISSUE_RATE
L2_RATE, DRAM_RATE = 0.8, 0.85
DRAM_CYCLES = 800         # that an iteration of the first loop waits for its loads
L2_CYCLES = 350           # and of the other loops
START_CYCLES = 1500       # of a program
REGISTERS = 2**16         # of an SM
WARPS = 64                # of an SM
RESERVED_BYTES = 1024     # of shared memory, per program
LONGEST_WAIT = 12         # instructions of a loop that waits for a barrier

CLASSES = [  # of opcodes; what matches first
    ("tensor", "HGMMA|HMMA|UTC|WARPGROUP|QGMMA"),
    ("memory", "LD|ST|UBLKCP|UTMA|ATOM|RED"),
    ("special", "MUFU"),
    ("shuffle", "SHFL"),
    ("convert", "F2F|F2I|I2F|HADD2|HFMA2|HMUL2"),
    ("float", "FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FSET|FCHK|FADD2|FMUL2|FFMA2"),
    ("sync", "BAR|DEPBAR|WARPSYNC|BSSY|BSYNC|FENCE|MEMBAR|LDGDEPBAR|SYNCS|ELECT|BRA|EXIT|CALL|RET"),
]


def measure_static(config, rows: list[Row], device: torch.device) -> dict[str, list]:
    """The list of static.json: a launch of each kernel for each shape and GPU."""
    launches = []
    for capability in GPUS:
        for shape in SHAPES["cuda"][:5]:
            announce(f"{GPUS[capability].name} {shape}")
            estimates, failed = attempt(estimate_launches, shape, capability, debug=config.debug)
            launches += estimates or [LaunchEstimate(shape, capability, failed=failed)]
    return {"launches": launches}


def estimate_launches(shape: Shape, capability: int, **knobs) -> list[LaunchEstimate]:
    """Training in float16. Compiles, so it is best called in a fresh process."""
    from kernels.depthwise_check import Case, compile_case, resources
    N, C, side, K = shape
    case = Case((N, C, side, side), K, "float16", (capability, 227 * 1024), knobs=knobs)
    started = compile_case(case)
    if not any(launch.part for launch in started):  # one launch each way: apply is for evaluation
        started = [launch for launch in started if launch.kernel != "apply_kernel"]
    return [estimate(launch, resources(launch.compiled), shape, capability) for launch in started]


def estimate(launch, taken: dict[str, int], shape: Shape, capability: int) -> LaunchEstimate:
    """What one launch takes, and how long, from the instructions of its kernel."""
    N, C, side, K = shape
    gpu, plan = GPUS[capability], launch.plan
    samples = -(-N // launch.grid[1])
    counts, waits = executed(launch.compiled.asm["cubin"], plan, samples)
    elements, programs = N * C * side * side, C * launch.grid[1]

    # programs at a time
    registers_per_warp = -(-taken["registers"] // 8) * 8 * 32
    per_sm = min(REGISTERS // (registers_per_warp * taken["warps"]), WARPS // taken["warps"],
                 gpu.shared_kb * 1024 // (taken["shared"] + RESERVED_BYTES))
    most = -(-programs // gpu.sms)  # programs of the fullest SM

    # instructions: the fullest pipe of a partition, with all programs of the SM and with one alone
    warps = taken["warps"] / PARTITIONS
    busy = max(pipe_cycles(counts).values()) * warps
    alone = sum(counts.values()) * warps / min(ISSUE_RATE_ALONE * warps, ISSUE_RATE) + waits
    cycles, left = 0.0, most
    while left > 0:
        at_once = min(per_sm, left)
        cycles += max(at_once * busy / ISSUE_RATE, alone)
        left -= at_once

    # bytes: what exceeds L2 is read again
    passes, least, arrays = traffic(launch)
    slab = 2 * samples * side * side
    live = min(per_sm * gpu.sms, programs) * slab * arrays
    missed = max(0.0, 1 - gpu.l2_mb * 1e6 / live)
    products = 8 * plan.BLOCK_OUT * (plan.ROWS + 2 * plan.HALO) * plan.W * programs / elements
    l2 = 2 * passes + (products if launch.kernel == "backward_kernel" and launch.part != "sums"
                       else 0.0)
    dram = 2 * (least + missed * (passes - least))
    times = {"instructions": cycles / gpu.ghz / 1e3,
             "L2": elements * l2 / gpu.l2_gb_s / L2_RATE / 1e3,
             "DRAM": elements * dram / gpu.dram_gb_s / DRAM_RATE / 1e3}
    matrix_products = 1
    if launch.kernel == "backward_kernel":
        matrix_products = {"sums": 1, "gradients": 2, "": 3}[launch.part]
    tensor_us = (2 * matrix_products * N * C * plan.TILES * plan.BLOCK_IN * plan.BLOCK_OUT
                 / gpu.tensor_tflops / 1e6)
    threads = 32 * taken["warps"]
    name = f"{launch.kernel.removesuffix('_kernel')} {launch.part}".strip()
    return LaunchEstimate(
        shape, capability, gpu.name, name,
        registers=taken["registers"], spilled_bytes=taken["spilled"],
        shared_bytes=taken["shared"], warps=taken["warps"], programs_per_sm=per_sm,
        rounds=-(-most // per_sm), instructions=by_class(counts, threads * programs / elements),
        l2_bytes=l2, dram_bytes=dram, estimate_us=max(times.values()),
        binds=max(times, key=times.get),
        floor_us=max(elements * 2 * least / gpu.dram_gb_s / 1e3, tensor_us))


def traffic(launch) -> tuple[int, int, int]:
    """How often an element passes L2, how often at least DRAM, and how many arrays are live."""
    maps = launch.plan.TILES == 1  # no z
    return {("forward_kernel", ""): (5, 2, 2),         # x, g written; g, x, y written
            ("forward_kernel", "moments"): (1, 1, 1),  # x
            ("apply_kernel", ""): (3, 2, 2),           # x twice, y written
            ("backward_kernel", ""): (5, 3, 3) if maps else (10, 3, 4),
            ("backward_kernel", "sums"): (2, 2, 2) if maps else (3, 3, 3),  # x, dy, z written
            # z, dy, dz written; dz, x, dy, dx written
            ("backward_kernel", "gradients"): (3, 3, 3) if maps else (7, 4, 4),
            }[launch.kernel, launch.part]


def executed(cubin: bytes, plan, samples: int) -> tuple[Counter, float]:
    """{opcode: instructions that one warp executes}, and the cycles that loads keep it waiting."""
    code, loops = disassembled(cubin)
    iterations = {"block": -(-samples // (plan.BLOCK_M // plan.BLOCK_T))
                  * -(-plan.TILES // plan.BLOCK_T),
                  "first": -(-samples * plan.H * plan.W // (plan.BLOCK_M * plan.BLOCK_OUT)),
                  "tap": -(-plan.K**2 // 32)}
    times, waits, latency = [1] * len(code), START_CYCLES, DRAM_CYCLES
    done = -1
    for start, end in loops:
        if end <= done or end - start < LONGEST_WAIT:
            continue  # it waits for a barrier
        name = python_loop(code[start:end + 1])
        if name not in iterations or start <= done:
            raise ValueError(f"the compiler made a loop that is none of {list(iterations)}: {name}")
        waits += iterations[name] * latency
        latency = L2_CYCLES
        times[start:end + 1] = [iterations[name]] * (end + 1 - start)
        done = end
    counts = Counter()
    for (opcode, _), n in zip(code, times, strict=True):
        counts[opcode] += n
    return counts, waits


def disassembled(cubin: bytes) -> tuple[list, list[tuple[int, int]]]:
    """[(opcode, source lines)] of each instruction, and the first and last index of each loop."""
    from kernels.depthwise_check import TOOLS
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", "-gi", file.name], capture_output=True,
                              text=True, check=True).stdout
    code, labels, jumps, lines, follows, last = [], {}, [], [], False, None
    for row in text.splitlines():
        if m := re.match(r"(\.L_x_\d+):", row):
            labels[m[1]] = len(code)
        elif m := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            lines = [] if follows else lines
            lines, follows = [*lines, (Path(m[1]).name, int(m[2]))], False
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\.\S*)?(\s.*)?;", row):
            follows = True
            if m[1] == "EXIT" and last is None and "@" not in row:
                last = len(code)  # what follows is rare: a barrier that was not ready
            if target := re.search(r"(\.L_x_\d+)", m[2] or ""):
                jumps.append((len(code), target[1]))
            if m[1] != "NOP":
                code.append((m[1], tuple(lines)))
    loops = {}
    for i, target in jumps:
        if labels.get(target, i) < i - 1 and i < (last or len(code)):
            loops[labels[target]] = max(i, loops.get(labels[target], 0))
    return code, sorted(loops.items())


def python_loop(body: list) -> str:
    """The variable of the innermost `for` statement that most of these instructions come from."""
    votes = Counter()
    for _, lines in body:
        inside = [loop for loop in python_loops() if any(
            name == "depthwise_triton.py" and loop[1] <= line <= loop[2] for name, line in lines)]
        votes.update(inside)
    enough = 0.8 * max(votes.values(), default=0)  # the compiler moves instructions out and in
    found = [loop for loop, n in votes.items() if n >= enough]
    return min(found, key=lambda loop: loop[2] - loop[1])[0] if found else "nothing"


@cache
def python_loops() -> list[tuple[str, int, int]]:
    """(variable, first line, last line) of the `for` statements of the kernels."""
    from kernels import depthwise_triton
    tree = ast.parse(Path(depthwise_triton.__file__).read_text())
    return [(node.target.id, node.lineno, node.end_lineno) for node in ast.walk(tree)
            if isinstance(node, ast.For)]


def class_of(opcode: str) -> str:
    return next((name for name, pattern in CLASSES if re.match(pattern, opcode)), "integer")


def by_class(counts: Counter, per_element: float) -> Instructions:
    """Instructions of a thread -> per element."""
    classes = Counter()
    for opcode, n in counts.items():
        classes[class_of(opcode)] += n * per_element
    return Instructions(sum(classes.values()), **{name: classes[name] for name in (
        "float", "special", "convert", "integer", "shuffle", "memory", "tensor", "sync")})


def pipe_cycles(counts: Counter) -> Counter:
    """Cycles that the instructions of one warp occupy issue and each pipe of a partition."""
    cycles = Counter(issue=sum(counts.values()))
    for opcode, n in counts.items():
        for name, pipe, pattern in PIPES:
            if re.match(pattern, opcode):
                cycles[pipe] += n * CYCLES[name]
                break
    return cycles
