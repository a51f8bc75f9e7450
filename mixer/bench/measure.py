"""What one model takes: parameters, FLOPs, bytes saved for backward, time, memory.

Each model is measured in a fresh process, so that none inherits another's allocator, caches or
cuDNN choices.
"""
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..experiments import EPOCH_IMAGES
from ..models.flops import TRAINING_PASSES, forward_flops
from ..report.measurements import Counts, Memory, Speed, StepMeasurement
from ..runtime.processes import attempt, in_one_line
from ..runtime.system import freed_memory_kept, peak_resident_mib
from ..training.recipe import make_optimizer, train_step
from .timing import Ceiling, race, repeated, summary, take_in_turn

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


class Samples(NamedTuple):
    """Milliseconds of each repeat, all four taken in turn."""
    training: list[float]   # one step
    inference: list[float]  # one step
    gflop: list[float]      # one GFLOP of a large matrix product
    gb: list[float]         # one GB read or written by a large copy


class Visit(NamedTuple):
    """What one fresh process measured of a model; the counts and memory only on the first visit."""
    counts: Counts | None
    memory: list[Memory]  # one per batch size
    samples: Samples


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


def count_model(make: MakeModel, load: Load) -> Counts:
    """Parameters, FLOPs and saved bytes."""
    model, images = make(), load.images()

    def forward():
        with load.autocast():
            return model.train()(images)
    return Counts(parameters=sum(p.numel() for p in model.parameters()),
                  gflop_per_image=forward_flops(model, load.image_size) / 1e9,
                  saved_mib_per_image=saved_bytes(forward) / load.batch_size / MIB)


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


def peaks(device: torch.device) -> tuple[float | None, float | None, float]:
    """MiB at most so far: (allocated, reserved, process).

    allocated, reserved: PyTorch's own, on CUDA only. process: on CUDA all memory in use on the
    GPU, the context and other processes included; on the CPU the resident size of this process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return (torch.cuda.max_memory_allocated(device) / MIB,
                torch.cuda.max_memory_reserved(device) / MIB, (total - free) / MIB)
    return None, None, peak_resident_mib()


@freed_memory_kept()
def training_memory(make: MakeModel, load: Load, batches: Sequence[int]) -> list[Memory]:
    """Peaks over three training steps at each of the batch sizes, which must rise.

    For the first model of a process, and apart from timing.
    """
    *_, before = peaks(load.device)
    model, results = make(), []
    for batch in batches:
        step = training_step(model, load._replace(batch_size=batch))
        for _ in range(3):
            step()
        allocated, reserved, process = peaks(load.device)
        training = process - before if allocated is None else allocated
        results.append(Memory(training, allocated, reserved, process, before))
        del step
        if load.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(load.device)
    return results


@freed_memory_kept()
def visit_model(make: MakeModel, load: Load, repeats: int, batches: Sequence[int]) -> Visit:
    """In a fresh process: memory at `batches`, counts, time. Without batches, only the time."""
    memory = training_memory(make, load, batches) if batches else []  # first: nothing ran before
    counts = count_model(make, load) if batches else None
    return Visit(counts, memory, time_model(make, load, repeats))


def time_model(make: MakeModel, load: Load, repeats: int, clock=time.perf_counter) -> Samples:
    """Time a training step and an inference step in turn with the machine's best rates."""
    model, count = make(), STEPS[load.device.type]
    ceiling = Ceiling(load.device, load.amp or torch.float32)
    ms = take_in_turn({"training": repeated(training_step(model, load), count),
                       "inference": repeated(inference_step(model, load), count),
                       **ceiling.ways}, repeats, load.device, clock)
    return Samples(training=[t / count for t in ms["training"]],
                   inference=[t / count for t in ms["inference"]],
                   gflop=[t / (ceiling.flops / 1e9) for t in ms["matmul"]],
                   gb=[t / (ceiling.bytes / 1e9) for t in ms["copy"]])


def time_training(make: MakeModel, load: Load, repeats: int) -> list[float]:
    """Milliseconds of each training step, with the allocator as it is: glibc's in a new process."""
    step = repeated(training_step(make(), load), STEPS[load.device.type])
    return [ms / STEPS[load.device.type]
            for ms in take_in_turn({"step": step}, repeats, load.device)["step"]]


@freed_memory_kept()
def time_training_as_train_py(make: MakeModel, load: Load, repeats: int) -> list[float]:
    """`time_training` with the allocator of our commands."""
    return time_training(make, load, repeats)


def speed(counts: Counts, batch: int, samples: Samples) -> Speed:
    """What the samples of all visits say about the time of a model.

    share_of_floor: a step takes at least 3x the forward FLOPs (backward counts twice) at the rate
    of a large matrix product. It also takes at least the bytes that must move at the rate of a
    large copy: each saved byte is written and read; Adam moves 32 bytes per parameter (fp32
    gradient written and read, weight and two moments read and written). The longer of the two is
    divided by the step that was taken in the same turn.
    """
    gflop = TRAINING_PASSES * counts.gflop_per_image * batch
    gb = (2 * counts.saved_mib_per_image * MIB * batch + 32 * counts.parameters) / 1e9
    shares = [max(gflop * ms_per_gflop, gb * ms_per_gb) / ms for ms, ms_per_gflop, ms_per_gb
              in zip(samples.training, samples.gflop, samples.gb, strict=True)]
    training, inference = summary(samples.training), summary(samples.inference)
    images_per_s = 1000 * batch / training.median
    return Speed(*training, images_per_s, *inference, 1000 * batch / inference.median,
                 seconds_per_25000_images=EPOCH_IMAGES / images_per_s,
                 share_of_floor=summary(shares).median,
                 matmul_gflop_s=1000 / summary(samples.gflop).median,
                 copy_gb_s=1000 / summary(samples.gb).median)


def compare_training(candidates: dict[str, MakeModel], load: Load, repeats: int,
                     debug: bool = False) -> list[StepMeasurement]:
    """Time the candidates in one fresh process, then measure each one's memory in its own."""
    results, failed = attempt(race_training, candidates, load, repeats, debug=debug)
    if failed:
        return [StepMeasurement(way=name, batch_size=load.batch_size, failed=failed)
                for name in candidates]
    for i, m in enumerate(results):
        if not m.failed:
            memory, failed = attempt(training_memory, candidates[m.way], load, [load.batch_size],
                                     debug=debug)
            results[i] = dataclasses.replace(m, memory=memory and memory[0], failed=failed)
    return results


@freed_memory_kept()
def race_training(candidates: dict[str, MakeModel], load: Load,
                  repeats: int) -> list[StepMeasurement]:
    """Time the training steps of the candidates in turn; without memory."""
    torch.compiler.reset()  # its limit of recompilations counts over all models of a process
    count = STEPS[load.device.type]

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
            steps[name] = repeated(step, count)

    times, ratios = race(steps, repeats, load.device) if steps else ({}, {})
    first, results = next(iter(candidates)), []
    for name in candidates:
        m = StepMeasurement(way=name, batch_size=load.batch_size, failed=failed.get(name))
        if name in times:
            t = times[name].per(count)
            m = dataclasses.replace(m, ms=t.median, p20=t.p20, p80=t.p80,
                                    faster=None if first in failed else 1 / ratios[name])
        results.append(m)
    return results
