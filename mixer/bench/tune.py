"""Time the block sizes of the Triton kernels on this GPU, beside the estimates without one.

First the kernels' tests run. Then the candidates of a shape are compiled in processes side by side,
compared with the launcher's own choice, and timed in turn. The fastest ones are a table for
kernels/depthwise_tiles.json.
"""
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kernels import reference

from ..experiments import Row
from ..report.measurements import TileMeasurement
from ..runtime.errors import InputError
from ..runtime.processes import attempt
from .block import COPIES, SHAPES, Shape
from .measure import announce
from .static import GPUS, estimate_launches
from .timing import captured, race

SECONDS = 400  # after which no other shape is started: so all ends within 8 minutes
TESTS = Path(__file__).parents[2] / "tests" / "kernels" / "test_depthwise_triton.py"
MODES = "forward", "backward"
WORKERS = max(1, (os.cpu_count() or 2) // 2)  # compilers at a time


def candidates(side: int) -> list[dict[str, int]]:
    """Knobs for maps of this side; first none, which is what the launcher chooses."""
    sizes = ([(64, 4, 128), (64, 4, 168), (64, 8, 128), (128, 8, 128), (128, 8, 255)] if side <= 12
             else [(32, 4, 255), (32, 8, 128), (64, 8, 128), (64, 8, 255), (128, 8, 255)])
    return [{}, *(dict(BLOCK_M=m, num_warps=w, maxnreg=r) for m, w, r in sizes),
            dict(num_stages=2), dict(num_stages=3)]


def tune_kernels(config, rows: list[Row], device: torch.device,
                 clock=time.monotonic) -> dict[str, list]:
    """The list of tune.json. Raises InputError without a GPU, RuntimeError if the tests fail."""
    if device.type != "cuda":
        raise InputError(f"--kernels-tune needs a GPU, and --device is {device}")
    deadline = clock() + SECONDS
    if TESTS.exists():
        announce("nothing yet: the kernels' tests run first")
        workers = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
        result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *workers, TESTS],
                                capture_output=True, text=True, cwd=TESTS.parents[2])
        if result.returncode:
            raise RuntimeError(f"the kernels' tests fail:\n{result.stdout[-2000:]}")
    tiles = []
    for shape in SHAPES["cuda"]:
        if clock() < deadline:
            announce(f"tiles {shape}")
            tiles += tune_shape(shape, config.repeats, device)
        else:
            tiles.append(TileMeasurement(shape, failed=f"not reached in {SECONDS} seconds"))
    return {"tiles": tiles}


def tune_shape(shape: Shape, repeats: int, device: torch.device,
               race=race) -> list[TileMeasurement]:
    """All candidates of one shape, forward and backward; those that fail say why."""
    from kernels import depthwise_check
    N, C, side, K = shape
    inputs = [Call(shape, seed, device) for seed in range(COPIES[device.type])]
    this = depthwise_check.depthwise_launch.device_of(inputs[0].x)

    # compile them side by side; a compiler may die
    def why_not(knobs):
        return depthwise_check.fails(depthwise_check.Case(
            (N, C, side, side), K, "float16", this, knobs=knobs))
    knobs = candidates(side)
    with ThreadPoolExecutor(WORKERS) as pool:
        failed = list(pool.map(why_not, knobs))

    # leave out those that are wrong; time the others in turn
    results = []
    for mode in MODES:
        estimate = estimated_ms(shape, this.capability, mode)
        expected = getattr(inputs[0], mode)({})
        ways, measured = {}, []
        for i, (given, reason) in enumerate(zip(knobs, failed, strict=True)):
            reason = reason or depthwise_check.disagreement(
                getattr(inputs[0], mode)(given), expected)
            if not reason:
                ways[i] = captured(lambda call, mode=mode, given=given: getattr(call, mode)(given),
                                   inputs, device)
            measured.append(TileMeasurement(shape, mode, given, estimate if i == 0 else None,
                                            failed=reason))
        times, ratios = race(ways, repeats, device) if ways else ({}, {})
        for i, t in times.items():
            t = t.per(len(inputs))
            measured[i] = dataclasses.replace(measured[i], ms=t.median, p20=t.p20, p80=t.p80,
                                              faster=1 / ratios[i])
        results += measured
    return results


class Call:
    """The two passes of the block at one shape, float16, with their inputs."""

    def __init__(self, shape: Shape, seed: int, device: torch.device):
        N, C, side, K = shape
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, torch.float16)
        self.x, self.dy = draw(N, C, side, side), draw(N, C, side, side)
        self.weight, self.channel = draw(C, 1, K, K) / K, draw(C).float()
        _, self.mean, self.var = reference.forward(
            self.x, self.weight, self.channel, None, None, None, None, 1e-5, True)

    def forward(self, knobs):
        from kernels import depthwise_launch
        return depthwise_launch.forward(self.x, self.weight, self.channel, self.channel,
                                        self.channel, None, None, 1e-5, True, **knobs)

    def backward(self, knobs):
        from kernels import depthwise_launch
        return depthwise_launch.backward(self.dy, self.x, self.weight, self.channel, self.channel,
                                         self.mean, self.var, 1e-5, True, True, **knobs)


def estimated_ms(shape: Shape, capability: int, mode: str) -> float | None:
    """By mixer.bench.static, for the GPUs that it knows."""
    if capability not in GPUS:
        return None
    estimates, _ = attempt(estimate_launches, shape, capability)
    return estimates and sum(m.estimate_us for m in estimates
                             if m.kernel.startswith("backward") == (mode == "backward")) / 1000
