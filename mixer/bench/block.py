"""The fused block against plain PyTorch: alone, in many shapes, and whole training steps."""
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
from ..runtime.device import freed_memory_kept, pick_amp
from ..runtime.processes import attempt
from .candidates import Block, block_candidates, build, build_timm
from .measure import Load, announce, compare_training, saved_bytes
from .timing import captured, large_copy, race

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
REPLAYS = {"cuda": 10, "cpu": 1}  # of all of them, in each repeat
WAYS = {"eager": ("torch", False), "compile": ("torch", True), "fused": ("auto", False)}
TIMM_MODEL = "convmixer_1024_20_ks9_p14"


def measure_kernels(config, rows: list[Row], device: torch.device) -> dict[str, list[dict]]:
    """The lists of kernels.json: the block, many shapes of it (CPU only), training steps."""
    blocks, shapes, steps = [], [], []
    amp, on_gpu = pick_amp(config.amp, device), device.type == "cuda"

    # the block alone
    for shape in SHAPES[device.type]:
        announce(f"block {shape}")
        measured, failed = attempt(measure_block, shape, amp, config.repeats, device)
        blocks += measured or [{"shape": shape, "batch_size": shape[0], "failed": failed}]
    for shape in [] if on_gpu else GRID:
        announce(f"block {shape}, eager and fused")
        measured, failed = attempt(measure_shape, shape, config.repeats)
        shapes += measured or [{"shape": shape, "failed": failed}]

    # training steps: our ConvMixers, and one of timm's, whose compilation takes too long
    load = Load(250 if on_gpu else 32, 192, device, amp)
    models = [(row.title, partial(build, row), WAYS, load, config.repeats)
              for row in rows if row.arch == "convmixer"]
    if importlib.util.find_spec("timm"):
        load = Load(64 if on_gpu else 8, 224, device, amp)
        models.append((f"timm {TIMM_MODEL}", partial(build_timm, TIMM_MODEL), ("eager", "fused"),
                       load, max(3, config.repeats // 5)))
    else:
        print(f"skipping {TIMM_MODEL}: it needs timm (pip install timm)", file=sys.stderr)
    for title, make, ways, load, repeats in models:
        announce(title)
        candidates = {way: partial(make, load.image_size, device, *WAYS[way]) for way in ways}
        steps += [{"model": title, "image_size": load.image_size, **step}
                  for step in compare_training(candidates, load, repeats)]
    return {"blocks": blocks, "shapes": shapes, "steps": steps}


@freed_memory_kept()
def measure_block(shape: Shape, amp: torch.dtype | None, repeats: int,
                  device: torch.device) -> list[dict]:
    """Each implementation of the block, in training mode: forward, and forward + backward.

    gb_s: of the bytes that must be read and written; copy_gb_s: of a large copy.
    """
    torch.manual_seed(0)
    copy, gb = large_copy(device)
    copy_gb_s = 1000 * gb / race({"copy": copy}, 9, device, REPLAYS[device.type])["copy"]["ms"]
    N, C, side, K = shape
    gb = N * C * side * side * (amp or torch.float32).itemsize / 1e9  # of an activation
    blocks = {name: block_passes(model, memory_format, shape, amp, device)
              for name, (model, memory_format) in block_candidates(C, K, device).items()}
    saved = {name: saved_bytes(partial(forward, inputs[0])) / N
             for name, (forward, _, inputs) in blocks.items()}

    # all candidates in turn, in one mode, then in the other
    rows = []
    for mode, activations in PASSES.items():
        times = race({name: captured(steps[mode], inputs, device)
                      for name, (_, steps, inputs) in blocks.items()},
                     repeats, device, REPLAYS[device.type])
        for name, row in times.items():
            ms, p20, p80 = (row[key] / COPIES[device.type] for key in ("ms", "p20", "p80"))
            rows.append({"shape": shape, "batch_size": N, "mode": mode, "way": name, "ms": ms,
                         "p20": p20, "p80": p80, "faster_than_eager": row["faster"],
                         "gb_s": 1000 * activations * gb / ms, "copy_gb_s": copy_gb_s,
                         "saved_bytes_per_sample": saved[name]})
    return rows


def block_passes(model: nn.Module, memory_format: torch.memory_format, shape: Shape,
                 amp: torch.dtype | None, device: torch.device) -> tuple[Callable, dict, list]:
    """The forward pass of a block, what is timed in each mode, and inputs for both: pairs (x, dy),
    (N, C, side, side) each."""
    N, C, side, _ = shape

    def activation():
        x = torch.randn(N, C, side, side, device=device, dtype=amp or torch.float32)
        return x.to(memory_format=memory_format)

    def forward(pair):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return model(pair[0])

    def forward_and_backward(pair):
        torch.autograd.grad(forward(pair), [pair[0], *model.parameters()], pair[1])
    inputs = [(activation().requires_grad_(), activation()) for _ in range(COPIES[device.type])]
    return forward, dict(zip(PASSES, (torch.no_grad()(forward), forward_and_backward),
                             strict=True)), inputs


@freed_memory_kept()
def measure_shape(shape: Shape, repeats: int) -> list[dict]:
    """How much faster the fused block is than eager on the CPU: both dtypes, both modes."""
    N, C, side, K = shape
    rows, cpu = [], torch.device("cpu")
    for dtype, mode in itertools.product(("float32", "bfloat16"), ("training", "evaluation")):
        amp = None if dtype == "float32" else torch.bfloat16
        ways = {}
        for name, model in (("eager", Block(C, K)), ("fused", DepthwiseGELUBN(C, K, True))):
            _, steps, inputs = block_passes(model.train(mode == "training"),
                                            torch.contiguous_format, shape, amp, cpu)
            step = steps["forward + backward" if mode == "training" else "forward"]
            ways[name] = partial(step, inputs[0])
        count = math.ceil(4 / race(ways, 3, cpu)["eager"]["ms"])  # 4 ms or more
        faster = race(ways, repeats, cpu, count)["fused"]["faster"]
        rows.append({"shape": shape, "dtype": dtype, "mode": mode, "faster": faster})
    return rows
