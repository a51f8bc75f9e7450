"""What one model takes: parameters, FLOPs, bytes saved for backward, time, memory.

Each model is measured in a fresh process, so that none inherits another's allocator, caches or
cuDNN choices. What is measured becomes a row: a dict, whose keys end in their unit.
"""
import contextlib
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..experiments import EPOCH_IMAGES
from ..models.flops import TRAINING_PASSES, forward_flops
from ..runtime.device import freed_memory_kept, peak_memory_mib
from ..runtime.processes import attempt, in_one_line
from ..training.recipe import make_optimizer, train_step
from .timing import large_copy, large_product, percentiles, race, take_in_turn

MIB = 2**20
STEPS = {"cuda": 10, "cpu": 1}  # in each repeat
MakeModel = Callable[[], nn.Module]  # -> a model on the device of the load


class Load(NamedTuple):
    """The input of a model: (batch_size, 3, image_size, image_size), its device, autocast dtype."""
    batch_size: int
    image_size: int
    device: torch.device
    amp: torch.dtype | None

    def images(self) -> torch.Tensor:
        return torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def announce(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


def training_step(model: nn.Module, load: Load) -> Callable:
    """A callable that takes one step as train.py does: forward, backward, Adam."""
    images = load.images()
    labels = torch.randint(0, 2, (load.batch_size,), device=load.device)
    optimizer = make_optimizer(model, 1e-4)
    # a small scale: a step that overflows is skipped, which takes less time and memory
    scaler = torch.amp.GradScaler(load.device.type, init_scale=2.0**10,
                                  enabled=load.amp == torch.float16)

    def step():
        model.train()
        train_step(model, images, labels, optimizer, scaler, amp=load.amp)
    return step


def inference_step(model: nn.Module, load: Load) -> Callable:
    """A callable that computes the logits of one batch, in eval mode."""
    images = load.images()

    @torch.inference_mode()
    def step():
        model.eval()
        with load.autocast():
            model(images)
    return step


def count_model(make: MakeModel, load: Load) -> dict:
    """Parameters; per image, the FLOPs of a forward pass and what autograd keeps for backward."""
    model, images = make(), load.images()

    def forward():
        with load.autocast():
            return model.train()(images)
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "gflop_per_image": forward_flops(model, load.image_size) / 1e9,
            "saved_mib_per_image": saved_bytes(forward) / load.batch_size / MIB}


def saved_bytes(forward: Callable) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`.

    Counts whole storages, each once, without parameters and their casts.
    """
    storages = {}

    def keep(t):
        node = t.grad_fn
        # a cast or transposed weight depends on its parameter alone
        while node is not None and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        of_parameter = isinstance(getattr(node, "variable", None), nn.Parameter)
        if not of_parameter and not isinstance(t, nn.Parameter):
            # held, so that no address is used twice
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())


@freed_memory_kept()
def training_memory(make: MakeModel, load: Load) -> dict:
    """Peaks over three training steps of the first model of a process, MiB.

    training: on CUDA of allocated tensors, on a CPU the growth of the process. process: on CUDA
    all memory in use on the GPU, the context and other processes included; on a CPU the resident
    size. before: the same, before the model is created.
    """
    on_gpu = load.device.type == "cuda"

    def process_mib():
        if not on_gpu:
            return peak_memory_mib(load.device)
        free, total = torch.cuda.mem_get_info(load.device)
        return (total - free) / MIB
    before, step = process_mib(), training_step(make(), load)
    for _ in range(3):
        step()
    process = process_mib()
    return {"training_mib": peak_memory_mib(load.device) if on_gpu else process - before,
            "process_mib": process, "before_mib": before}


@freed_memory_kept()
def visit_model(make: MakeModel, load: Load, repeats: int) -> tuple[dict, dict[str, list[float]]]:
    """In a fresh process: what the model takes, and milliseconds for each repeat.

    The milliseconds are of a training step, of an inference step, of a GFLOP of a large matrix
    product and of a GB of a large copy, taken in turn.
    """
    make = functools.cache(make)  # one model, compiled once
    memory = training_memory(make, load)  # first: nothing ran before
    model, counts = make(), count_model(make, load)
    product, gflop = large_product(load.device, load.amp or torch.float32)
    copy, gb = large_copy(load.device)
    ms = take_in_turn({"training": training_step(model, load),
                       "inference": inference_step(model, load), "gflop": product, "gb": copy},
                      repeats, load.device, STEPS[load.device.type])
    return counts | memory, ms | {"gflop": [t / gflop for t in ms["gflop"]],
                                  "gb": [t / gb for t in ms["gb"]]}


def speed(counts: dict, batch: int, ms: dict[str, list[float]]) -> dict:
    """What the times of all visits say of a model.

    share_of_floor: a step takes at least 3x the forward FLOPs (backward counts twice) at the rate
    of a large matrix product. It also takes at least the bytes that must move at the rate of a
    large copy: each saved byte is written and read; Adam moves 32 bytes per parameter (fp32
    gradient written and read, weight and two moments read and written). The longer of the two is
    divided by the step that was taken in the same turn.
    """
    gflop = TRAINING_PASSES * counts["gflop_per_image"] * batch
    gb = (2 * counts["saved_mib_per_image"] * MIB * batch + 32 * counts["parameters"]) / 1e9
    shares = [max(gflop * ms_per_gflop, gb * ms_per_gb) / step for step, ms_per_gflop, ms_per_gb
              in zip(ms["training"], ms["gflop"], ms["gb"], strict=True)]
    row = {}
    for mode in ("training", "inference"):
        times = percentiles(ms[mode])
        row |= {f"{mode}_{key}": value for key, value in times.items()}
        row[f"{mode}_images_per_s"] = 1000 * batch / times["ms"]
    return row | {"seconds_per_25000_images": EPOCH_IMAGES / row["training_images_per_s"],
                  "share_of_floor": percentiles(shares)["ms"],
                  "matmul_gflop_s": 1000 / percentiles(ms["gflop"])["ms"],
                  "copy_gb_s": 1000 / percentiles(ms["gb"])["ms"]}


def time_training(make: MakeModel, load: Load, repeats: int, kept: bool) -> list[float]:
    """Milliseconds of a training step, for each repeat, in a new process.

    kept: with the allocator of our commands, else with glibc's own.
    """
    with freed_memory_kept() if kept else contextlib.nullcontext():
        step = training_step(make(), load)
        return take_in_turn({"": step}, repeats, load.device, STEPS[load.device.type])[""]


def compare_training(candidates: dict[str, MakeModel], load: Load, repeats: int) -> list[dict]:
    """A row for each candidate: all timed in one fresh process, then the memory of each in its own.

    A row that failed has `failed`, in one line.
    """
    rows, failed = attempt(race_training, candidates, load, repeats)
    if failed:
        return [{"way": name, "batch_size": load.batch_size, "failed": failed}
                for name in candidates]
    for row in rows:
        if "failed" not in row:
            memory, failed = attempt(training_memory, candidates[row["way"]], load)
            row |= {"failed": failed} if failed else memory
    return rows


@freed_memory_kept()
def race_training(candidates: dict[str, MakeModel], load: Load, repeats: int) -> list[dict]:
    """Time the training steps of the candidates in turn; without memory."""
    torch.compiler.reset()  # its limit of recompilations counts over all models of a process

    # build and compile; one that fails does not stop the others
    steps, failed = {}, {}
    for name, make in candidates.items():
        try:
            torch.manual_seed(0)
            step = training_step(make(), load)
            step()
        except Exception as e:  # no C++ compiler, a model that does not compile, no memory
            failed[name] = in_one_line(e)
        else:
            steps[name] = step

    times = race(steps, repeats, load.device, STEPS[load.device.type]) if steps else {}
    if next(iter(candidates)) in failed:  # faster than what?
        for row in times.values():
            del row["faster"]
    return [{"way": name, **times.get(name, {}), "batch_size": load.batch_size,
             **({"failed": failed[name]} if name in failed else {})} for name in candidates]
