"""What a model takes: parameters, FLOPs, time, memory, bytes kept for backward; and what a batch of data takes.

Memory and models are measured in fresh processes, so that none inherits another's allocator, caches or cuDNN choices.
"""
import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..experiments import EPOCH_IMAGES
from ..runtime.processes import attempt, in_one_line
from .timing import Ceiling, race, several, summary, take_in_turn
from ..training.recipe import make_optimizer, train_step

MIB = 2**20


class Load(NamedTuple):
    """What a model is given, (batch_size, 3, image_size, image_size), where, and under which autocast dtype (or None)."""
    batch_size: int
    image_size: int
    device: torch.device
    amp: torch.dtype | None

    def images(self):
        return torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=self.device)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def training_step(model, load):
    """A callable that takes one step as train.py does: forward, backward, Adam."""
    images, labels = load.images(), torch.randint(0, 2, (load.batch_size,), device=load.device)
    optimizer = make_optimizer(model, 1e-4)
    # a small scale, so that no step overflows and is skipped, which would take less time and memory
    scaler = torch.amp.GradScaler(load.device.type, init_scale=2.0**10, enabled=load.amp == torch.float16)

    def step():
        model.train()
        train_step(model, images, labels, optimizer, scaler, amp=load.amp)
    return step


def inference_step(model, load):
    """A callable that takes the logits of one batch, in eval mode."""
    images = load.images()

    @torch.inference_mode()
    def step():
        model.eval()
        with load.autocast():
            model(images)
    return step


def forward_flops(model, image_size):
    """Floating-point operations of convs and matrix products for one image, counted on a copy without memory or arithmetic."""
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def saved_bytes(forward):
    """Bytes that autograd keeps for the backward of `forward()`: whole storages, each once, without parameters and their casts."""
    storages = {}

    def keep(t):
        node = t.grad_fn
        while node is not None and len(node.next_functions) == 1:  # a cast or transposed weight hangs on its parameter alone
            node = node.next_functions[0][0]
        if not isinstance(t, nn.Parameter) and not isinstance(getattr(node, "variable", None), nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address comes twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())


def memory_now(device):
    """MiB in use: {allocated, reserved: PyTorch's peaks, on CUDA alone; process: all that the GPU has given away, the CUDA
    context and other processes included (mem_get_info), or on the CPU the peak resident size of this process (Linux)}."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return {"allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
                "reserved_mib": torch.cuda.max_memory_reserved(device) / MIB, "process_mib": (total - free) / MIB}
    # getrusage would count what the parent had when it started this process
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"allocated_mib": None, "reserved_mib": None, "process_mib": int(status["VmHWM"].split()[0]) / 1024}


def training_memory(make, load, batches):
    """Peaks over three training steps at each of the batch sizes, which must rise: a dict for each.

    A pass of its own, for the first model of a process. make() -> model on load.device. before_mib: the process without a
    model; training_mib: what training took, on CUDA the tensors allocated, on a CPU what the process grew by.
    """
    before = memory_now(load.device)["process_mib"]
    model, rows = make(), []
    for batch in batches:
        step = training_step(model, load._replace(batch_size=batch))
        for _ in range(3):
            step()
        now = memory_now(load.device)
        took = now["process_mib"] - before if now["allocated_mib"] is None else now["allocated_mib"]
        rows.append({"batch_size": batch, "training_mib": took, **now, "before_mib": before})
        del step
        if load.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(load.device)
    return rows


def count_model(make, load):
    """What does not depend on the day, as plain values: parameters, forward FLOPs, bytes saved for backward."""
    model, images = make(), load.images()

    def forward():
        with load.autocast():
            return model.train()(images)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflop_per_image": forward_flops(model, load.image_size) / 1e9,
            "saved_mib_per_image": saved_bytes(forward) / load.batch_size / MIB}


def time_model(make, load, repeats, clock=time.perf_counter):
    """{what: milliseconds of each repeat}: a step of training and of inference, and, in turn with them, the machine's best at
    gflop, a GFLOP of a large matrix product, and gb, a GB read or written by a large copy."""
    model, steps = make(), steps_at_once(load.device)
    ceiling = Ceiling(load.device, load.amp or torch.float32)
    samples = take_in_turn({"training": several(training_step(model, load), steps),
                            "inference": several(inference_step(model, load), steps), **ceiling.ways}, repeats, load.device, clock)
    units = {"training": ("training", steps), "inference": ("inference", steps),
             "gflop": ("matmul", ceiling.flops / 1e9), "gb": ("copy", ceiling.bytes / 1e9)}
    return {name: [ms / unit for ms in samples[way]] for name, (way, unit) in units.items()}


def visit_model(make, load, repeats, batches):
    """For a fresh process: (counts and peaks of a model, `training_memory` at `batches`, times). Without batches, only times."""
    memory = training_memory(make, load, batches) if batches else []  # first, while the process has done nothing
    return {**count_model(make, load), **memory[-1]} if batches else {}, memory, time_model(make, load, repeats)


def times_and_floor(row, times):
    """Of a row's counts and `times`, of all visits: what a table says about time, as plain values.

    share_of_floor: a step cannot take less than 3x the forward FLOPs (backward counts twice) at the rate of a large matrix
    product, nor than moving what it must at the rate of a large copy: each saved byte written and read, and for Adam 32
    bytes a parameter (fp32 gradient written and read; weight and two moments read and written). The longer of the two,
    divided by the step beside which it was taken.
    """
    batch = row["batch_size"]
    gflop = 3 * row["gflop_per_image"] * batch
    gb = (2 * row["saved_mib_per_image"] * MIB * batch + 32 * row["parameters"]) / 1e9
    told = {}
    for what in ("training", "inference"):
        median, p20, p80 = summary(times[what])
        told |= {f"{what}_ms": median, f"{what}_p20": p20, f"{what}_p80": p80, f"{what}_images_per_s": 1000 * batch / median}
    floors = [max(gflop * a, gb * b) / step for step, a, b in zip(times["training"], times["gflop"], times["gb"])]
    return {**told, f"seconds_per_{EPOCH_IMAGES}_images": EPOCH_IMAGES / told["training_images_per_s"],
            "share_of_floor": summary(floors).median, "matmul_gflop_s": 1000 / summary(times["gflop"]).median,
            "copy_gb_s": 1000 / summary(times["gb"]).median}


def steps_at_once(device):
    return 10 if device.type == "cuda" else 1


def race_training(makes, load, repeats):
    """Training steps of several models {way: make}, in turn: a dict for each, with `faster` than the first way (None where
    that failed), or with `failed`."""
    torch.compiler.reset()  # its limit of recompilations counts over all models of a process
    steps, failed, count = {}, {}, steps_at_once(load.device)
    for way, make in makes.items():
        try:
            torch.manual_seed(0)
            step = training_step(make(), load)
            step()  # compiles
        except Exception as e:  # no C++ compiler, a model that does not compile, no memory: the others are measured still
            failed[way] = in_one_line(e)
        else:
            steps[way] = several(step, count)
    times, ratios = race(steps, repeats, load.device) if steps else ({}, {})
    return [{"way": way, "failed": failed[way]} if way in failed else
            {"way": way, "ms": times[way].median / count, "p20": times[way].p20 / count, "p80": times[way].p80 / count,
             "faster": None if next(iter(makes)) in failed else 1 / ratios[way]} for way in makes]


def compare_training(makes, load, repeats, debug=False):
    """`race_training` in a fresh process, and `training_memory` of each way in one of its own."""
    rows, failed = attempt(race_training, makes, load, repeats, debug=debug)
    rows = rows or [{"way": way, **failed} for way in makes]
    for row in rows:
        row["batch_size"] = load.batch_size
        if "failed" not in row:
            memory, failed = attempt(training_memory, makes[row["way"]], load, [load.batch_size], debug=debug)
            row |= failed or memory[0]
    return rows


def largest(fits, most=2**20):
    """The largest batch for which fits(batch), by doubling from 2, then halving the gap; 0 where not even 2 does."""
    good, bad = 0, 2
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while good and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_batch(make, load, budget):
    """The largest batch that trains in `budget` bytes of GPU memory, the CUDA context included; in a fresh process, on CUDA."""
    device = load.device
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(max(0.0, budget - context) / total, device)
    model = make()

    def fits(batch):
        try:
            step = training_step(model, load._replace(batch_size=batch))
            for _ in range(3):
                step()
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True
    return largest(fits)


def say(text):
    print(f"measuring {text}", file=sys.stderr, flush=True)
