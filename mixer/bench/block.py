"""The fused block against plain PyTorch: alone, in many shapes, and whole training steps."""
import dataclasses
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from kernels import DepthwiseGELUBN

from ..experiments import Row
from ..report.measurements import BlockMeasurement, ShapeMeasurement, StepMeasurement
from ..runtime.device import pick_amp
from ..runtime.processes import attempt
from ..runtime.system import freed_memory_kept
from .candidates import Block, block_candidates, build, build_timm
from .measure import Load, announce, compare_training, saved_bytes
from .timing import captured, copy_bandwidth, race, repeated

Shape = tuple[int, int, int, int]  # N, C, side, K

# ConvMixer at patch 24 and 16, ImageNet ConvMixers, and a small kernel, where PyTorch is good
SHAPES = {
    "cuda": [(250, 512, 8, 9), (250, 512, 12, 9), (64, 1024, 16, 9), (64, 768, 32, 7),
             (64, 1536, 32, 9), (250, 512, 8, 3), (8, 64, 12, 9)],
    "cpu": [(32, 512, 8, 9), (32, 512, 12, 9), (8, 1024, 16, 9), (2, 768, 32, 7),
            (32, 512, 8, 3), (8, 64, 12, 9)],
}
# of the CPU: where the fused block must not be slower than eager
GRID = [(N, 512, side, K) for K in (3, 5, 7, 9) for side in (4, 8, 12, 16, 32)
        for N in (2, 8, 32, 128) if N * side ** 2 <= 2 ** 13]
# activations that must be read or written: x and y; in the backward pass x, dy and dx
PASSES = {"forward": 2, "forward + backward": 5}
COPIES = {"cuda": 4, "cpu": 1}  # of the input, in turn: more than a GPU's cache, as in training
TIMM_MODEL = "convmixer_1024_20_ks9_p14"


def measure_kernels(config, rows: list[Row], device: torch.device) -> dict[str, list]:
    """The lists of kernels.json: the block, many shapes of it (CPU only), training steps."""
    blocks, shapes, steps = [], [], []
    amp, on_gpu = pick_amp(config.amp, device), device.type == "cuda"

    # the block alone
    for shape in SHAPES[device.type]:
        announce(f"block {shape}")
        measured, failed = attempt(measure_block, shape, amp, config.repeats, device,
                                   debug=config.debug)
        blocks += measured or [BlockMeasurement(shape, shape[0], failed=failed)]
    for shape in [] if on_gpu else GRID:
        announce(f"block {shape}, eager and fused")
        measured, failed = attempt(measure_shape, shape, config.repeats, debug=config.debug)
        shapes += measured or [ShapeMeasurement(shape, failed=failed)]

    # training steps of our ConvMixers
    load = Load(250 if on_gpu else 32, 192, device, amp)
    for row in rows:
        if row.arch == "convmixer":
            ours = partial(build, row.arch, row.options, load.image_size, device)
            candidates = {"eager": partial(ours, kernels="torch", compile=False),
                          "compile": partial(ours, kernels="torch", compile=True),
                          "fused": partial(ours, kernels="auto", compile=False)}
            steps += measure_steps(row.title, candidates, load, config.repeats, config.debug)

    # training steps of timm's
    if importlib.util.find_spec("timm"):
        load = Load(64 if on_gpu else 8, 224, device, amp)
        candidates = {"eager": partial(build_timm, TIMM_MODEL, device, kernels="torch"),
                      "fused": partial(build_timm, TIMM_MODEL, device, kernels="auto")}
        steps += measure_steps(f"timm {TIMM_MODEL}", candidates, load,
                               max(3, config.repeats // 5), config.debug)
    else:
        print(f"skipping {TIMM_MODEL}: it needs timm (pip install timm)", file=sys.stderr)
    return {"blocks": blocks, "shapes": shapes, "steps": steps}


def measure_steps(model: str, candidates: dict[str, Callable], load: Load, repeats: int,
                  debug: bool) -> list[StepMeasurement]:
    announce(model)
    return [dataclasses.replace(m, model=model, image_size=load.image_size)
            for m in compare_training(candidates, load, repeats, debug)]


@freed_memory_kept()
def measure_block(shape: Shape, amp: torch.dtype | None, repeats: int,
                  device: torch.device) -> list[BlockMeasurement]:
    """Each implementation of the block, in training mode: forward, and forward + backward."""
    torch.manual_seed(0)
    copy_gb_s = copy_bandwidth(device)
    N, C, side, K = shape
    activation_bytes = N * C * side * side * (amp or torch.float32).itemsize

    # the candidates with their inputs, and what each saves for backward
    passes = {name: BlockPasses(model, memory_format, shape, amp, device)
              for name, (model, memory_format) in block_candidates(C, K, device).items()}
    saved = {name: saved_bytes(partial(p.forward, p.inputs[0])) / N for name, p in passes.items()}

    # all candidates in turn, in one mode, then in the other
    results = []
    for mode, activations in PASSES.items():
        ways = {name: captured(p.step(mode), p.inputs, device) for name, p in passes.items()}
        times, ratios = race(ways, repeats, device)
        for name in ways:
            t = times[name].per(COPIES[device.type])
            results.append(BlockMeasurement(
                shape, N, mode, name, t.median, t.p20, t.p80, faster_than_eager=1 / ratios[name],
                gb_s=activations * activation_bytes / t.median / 1e6, copy_gb_s=copy_gb_s,
                saved_bytes_per_sample=saved[name]))
    return results


class BlockPasses:
    """The passes of one block, and inputs for them: pairs (x, dy), (N, C, side, side) each."""

    def __init__(self, model: nn.Module, memory_format: torch.memory_format, shape: Shape,
                 amp: torch.dtype | None, device: torch.device):
        N, C, side, _ = shape
        self.model, self.amp, self.device = model, amp, device

        def activation():
            x = torch.randn(N, C, side, side, device=device, dtype=amp or torch.float32)
            return x.to(memory_format=memory_format)
        self.inputs = [(activation().requires_grad_(), activation())
                       for _ in range(COPIES[device.type])]

    def step(self, mode: str) -> Callable:
        return torch.no_grad()(self.forward) if mode == "forward" else self.forward_and_backward

    def forward(self, pair):
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return self.model(pair[0])

    def forward_and_backward(self, pair):
        x, dy = pair
        torch.autograd.grad(self.forward(pair), [x, *self.model.parameters()], dy)


@freed_memory_kept()
def measure_shape(shape: Shape, repeats: int) -> list[ShapeMeasurement]:
    """How much faster the fused block is than eager on the CPU: both dtypes, both modes."""
    N, C, side, K = shape
    measured = []
    for dtype, mode in itertools.product(("float32", "bfloat16"), ("training", "evaluation")):
        amp = None if dtype == "float32" else torch.bfloat16
        ways = {}
        for name, model in (("eager", Block(C, K)), ("fused", DepthwiseGELUBN(C, K, True))):
            passes = BlockPasses(model.train(mode == "training"), torch.contiguous_format, shape,
                                 amp, torch.device("cpu"))
            step = passes.step("forward + backward" if mode == "training" else "forward")
            ways[name] = partial(step, passes.inputs[0])
        times, _ = race(ways, 3, torch.device("cpu"))
        count = math.ceil(4 / times["eager"].median)  # 4 ms or more
        ways = {name: repeated(way, count) for name, way in ways.items()}
        ratio = race(ways, repeats, torch.device("cpu"))[1]["fused"]
        measured.append(ShapeMeasurement(shape, dtype, mode, 1 / ratio))
    return measured
