"""The fused unit against plain PyTorch: alone, in many shapes, and in whole training steps."""
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pkgutil import resolve_name

import torch
from torch import nn

from ..experiments import Row
from ..models import create_model
from ..runtime.device import dtype_name, keep_freed_memory, pick_amp
from ..runtime.processes import in_fresh_process
from .candidates import build, unit_candidates
from .measure import Workload, announce, measure_in_turn, saved_bytes
from .timing import race

Shape = tuple[int, int, int, int]  # N, C, side, K

# ConvMixer at patch 24 and 16, ImageNet ConvMixers, and a small kernel, where PyTorch is good
SHAPES = {
    "cuda": [(250, 512, 8, 9), (250, 512, 12, 9), (64, 1024, 16, 9), (64, 768, 32, 7),
             (64, 1536, 32, 9), (250, 512, 8, 3), (8, 64, 12, 9)],
    "cpu": [(32, 512, 8, 9), (32, 512, 12, 9), (8, 1024, 16, 9), (2, 768, 32, 7),
            (32, 512, 8, 3), (8, 64, 12, 9)],
}
# of the CPU: where the fused unit must not be slower than eager
GRID = [(N, 512, side, K) for K in (3, 5, 7, 9) for side in (4, 8, 12, 16, 32)
        for N in (2, 8, 32, 128) if N * side ** 2 <= 2 ** 13]
# --kernels and --compile of each candidate; timm's takes too long to compile
STEPS = {"eager": ("torch", False), "compile": ("torch", True), "fused": ("auto", False)}
TIMM_MODEL = "convmixer_1024_20_ks9_p14"


def measure_kernels(config, rows: list[Row], device: torch.device) -> dict[str, list[dict]]:
    """The lists of kernels.json: the unit, many shapes of it (CPU only), training steps."""
    amp, on_gpu = pick_amp(config.amp, device), device.type == "cuda"

    # the unit alone
    lists = {"blocks": [], "shapes": []}
    calls = [("blocks", shape, (amp,), ()) for shape in SHAPES[device.type]]
    if not on_gpu:
        calls += [("shapes", shape, (None, torch.bfloat16), ("eager", "fused")) for shape in GRID]
    for name, shape, dtypes, candidates in calls:
        announce("unit", shape)
        measured, failed = in_fresh_process(measure_unit, shape, dtypes, config.repeats, device,
                                            candidates)
        lists[name] += measured or [{"shape": shape_text(shape), "failed": failed}]
    lists["shapes"] = [one for one in lists["shapes"] if one.get("candidate") != "eager"]

    # training steps: our ConvMixers, and one of timm's
    workload = Workload(250 if on_gpu else 32, 192, device, amp)
    groups = [(workload, {(row.title, 192, name): partial(
        build, partial(create_model, row.arch, **row.options), device, *options)
        for name, options in STEPS.items()}) for row in rows if row.arch == "convmixer"]
    if find_spec("timm"):
        groups.append((Workload(64 if on_gpu else 8, 224, device, amp), {
            (f"timm {TIMM_MODEL}", 224, name): partial(
                build, resolve_name(f"timm.models:{TIMM_MODEL}"), device, *STEPS[name])
            for name in ("eager", "fused")}))
    return {**lists, "steps": measure_in_turn(groups, config.repeats)}


def shape_text(shape: Shape) -> str:
    N, C, side, K = shape
    return f"{N}, {C}, {side}x{side}, {K}"


def measure_unit(shape: Shape, dtypes: Sequence[torch.dtype | None], repeats: int,
                 device: torch.device, names: Sequence[str] = ()) -> list[dict]:
    """Each implementation of the unit, or those named, in autocast to each dtype: forward and
    backward in training mode, forward in evaluation mode.
    """
    keep_freed_memory()
    (_, C, _, K), results = shape, []
    for amp in dtypes:
        models = unit_candidates(C, K, device)
        units = {name: unit_steps(models[name], shape, amp, device, "NHWC" in name)
                 for name in names or models}
        # all candidates in turn, in one mode, then in the other
        for mode in ("training", "evaluation"):
            for model in models.values():
                model.train(mode == "training")
            steps = {name: step[mode] for name, (step, _) in units.items()}
            count = math.ceil(4 / race({"": steps["eager"]}, 3, device)[""]["ms"])  # 4 ms or more
            results += [{"shape": shape_text(shape), "mode": mode, "candidate": name, **times,
                         "dtype": dtype_name(amp), "saved_bytes_per_sample": units[name][1]}
                        for name, times in race(steps, repeats, device, count).items()]
    return results


def unit_steps(model: nn.Module, shape: Shape, amp: torch.dtype | None, device: torch.device,
               channels_last: bool) -> tuple[dict[str, Callable], float]:
    """{mode: the step to time} of a unit on x (N, C, side, side); bytes it saves per sample."""
    N, C, side, _ = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # random input and gradient, in the layout asked for
    x, dy = (torch.randn(N, C, side, side, device=device, dtype=amp or torch.float32)
             .to(memory_format=layout) for _ in range(2))
    x.requires_grad_()

    def forward():
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return model(x)

    def forward_and_backward():
        torch.autograd.grad(forward(), [x, *model.parameters()], dy)
    steps = {"training": forward_and_backward, "evaluation": torch.no_grad()(forward)}
    return steps, saved_bytes(forward) / N
