"""What a model takes: parameters, FLOPs, bytes saved for backward, memory, time.

Each model is measured in fresh processes, so that none inherits another's allocator, caches or
cuDNN choices. A measurement is a dict; most keys name their unit (p20, p80: ms).
"""
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..experiments import EPOCH_IMAGES, Row
from ..models import create_model
from ..models.flops import forward_flops
from ..runtime.device import keep_freed_memory, peak_memory_mib, pick_amp
from ..runtime.processes import in_fresh_process
from ..training.config import Config
from ..training.trainer import make_optimizer, train_step
from .candidates import PEERS, build, peer_maker
from .data import measure_data
from .timing import median_ratio, percentiles, take_in_turn

MIB = 2**20
STEPS = {"cuda": 10, "cpu": 1}  # in each repeat
# minutes apart, so that the spread includes what differs between them
PROCESSES_PER_ROW = 3
MakeModel = Callable[[], nn.Module]  # -> a model on the device of the workload


class Workload(NamedTuple):
    """The input of a model: (batch_size, 3, image_size, image_size), its device, autocast dtype."""
    batch_size: int
    image_size: int
    device: torch.device
    amp: torch.dtype | None

    def images(self) -> torch.Tensor:
        return torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def announce(*words: object) -> None:
    print("measuring", *words, file=sys.stderr, flush=True)


def measure_models(config, rows: list[Row], device: torch.device) -> dict[str, list[dict]]:
    """The lists of bench.json: the rows at each image size, and on request peers and data.

    A peer is measured beside ours, eager and compiled, at the same precision; and by itself, in
    plain fp32.
    """
    # ours, and beside it its peers, in one group of the same workload
    groups, compared = [], set()
    for side, row in itertools.product(config.image_size, rows):
        workload = Workload(config.batch_size, side, device, pick_amp(config.amp, device))
        create = partial(create_model, row.arch, image_size=side, **row.options)
        models = {(row.title, side, "ours"): partial(build, create, device, "auto", config.compile)}
        groups.append((workload, models))
        if config.peers and row.arch in PEERS:
            package, create = PEERS[row.arch][0].split(".")[0], peer_maker(row, side)
            eager, compiled = (partial(build, create, device, compile=compile)
                               for compile in (False, True))
            models |= {(row.title, side, package): eager,
                       (row.title, side, f"{package}, compiled"): compiled}
            groups.append((workload._replace(amp=None),
                           {(row.title, side, f"{package}, plain fp32"): eager}))
            compared.add(row.title)

    # one list a table
    measured = measure_in_turn(groups, config.repeats)
    lists = {"models": [result for result in measured if result["candidate"] == "ours"]}
    if config.peers:
        lists["peers"] = [result for result in measured if result["row"] in compared]
    if config.data:
        announce(config.data)
        stages, failed = in_fresh_process(measure_data, config.data, config.image_size[0],
                                          config.batch_size, device, config.repeats)
        lists["data"] = stages or [{"stage": "all", "failed": failed}]
    return lists


def measure_in_turn(groups: list[tuple[Workload, dict[tuple, MakeModel]]],
                    repeats: int) -> list[dict]:
    """A result per model. A group: a workload and {(title, image size, candidate): how to make it}.

    `faster` and `memory_ratio` compare it to the first one of its title and image size. A model
    that fails is not measured again, and its result says why.
    """
    # counts and memory, each model in a process of its own
    results, times = {}, {}
    for workload, models in groups:
        for key, make in models.items():
            announce("memory:", *key)
            taken, failed = in_fresh_process(measure_memory, make, workload)
            results[key] = {"row": key[0], "candidate": key[2], "image_size": workload.image_size,
                            "batch_size": workload.batch_size, **(taken or {"failed": failed})}

    # times, the groups in turn, and in each process its models in turn
    for number, (workload, models) in itertools.product(range(PROCESSES_PER_ROW), groups):
        models = {key: make for key, make in models.items() if "failed" not in results[key]}
        if not models:
            continue
        announce(f"time, {number + 1} of {PROCESSES_PER_ROW}:", *next(iter(models)))
        taken, failed = in_fresh_process(
            time_models, models, workload, repeats // PROCESSES_PER_ROW)
        for key in models if failed else ():
            results[key]["failed"] = failed
        for key, ms in (taken or {}).items():
            times.setdefault(key, []).extend(ms)

    # medians and ratios of the times
    for key, result in results.items():
        if "failed" in result:
            continue
        for mode in ("training", "inference"):
            ms = percentiles(times[key, mode])
            result |= {f"{mode}_{name}": value for name, value in ms.items()}
            result[f"{mode}_images_per_s"] = 1000 * result["batch_size"] / ms["ms"]
        result["seconds_per_25000_images"] = EPOCH_IMAGES / result["training_images_per_s"]
        first = next(other for other in results if other[:2] == key[:2])
        if "failed" not in results[first]:
            result["faster"] = median_ratio(times[first, "training"], times[key, "training"])
            result["memory_ratio"] = results[first]["training_mib"] / result["training_mib"]
    return list(results.values())


def time_models(models: dict, workload: Workload, repeats: int) -> dict[tuple, list[float]]:
    """{key: make} -> {(key, "training" or "inference"): milliseconds of a step for each repeat}."""
    keep_freed_memory()  # as train.py does
    steps = {(key, mode): step for key, make in models.items()
             for mode, step in model_steps(make(), workload).items()}
    return take_in_turn(steps, repeats, workload.device, STEPS[workload.device.type])


def model_steps(model: nn.Module, workload: Workload) -> dict[str, Callable]:
    """training: a step as train.py takes it: forward, backward, Adam. inference: the logits of one
    batch, in eval mode.
    """
    images = workload.images()
    labels = torch.randint(0, 2, (workload.batch_size,), device=workload.device)
    optimizer = make_optimizer(model, Config())
    # a small scale: a step that overflows is skipped, which takes less time and memory
    scaler = torch.amp.GradScaler(workload.device.type, init_scale=2.0**10,
                                  enabled=workload.amp == torch.float16)

    def training():
        model.train()
        train_step(model, images, labels, optimizer, scaler, amp=workload.amp)

    @torch.inference_mode()
    def inference():
        model.eval()
        with workload.autocast():
            model(images)
    return {"training": training, "inference": inference}


def measure_memory(make: MakeModel, workload: Workload) -> dict:
    """Parameters; per image, the FLOPs of a forward pass and the bytes that autograd saves; MiB.

    Peaks over three training steps of the first model of a process. training_mib: on CUDA of
    allocated tensors, on a CPU the growth of the process. process_mib: on CUDA all memory in use on
    the GPU, the context and other processes included; on a CPU the resident size.
    """
    # memory first: nothing ran before; a first optimizer imports 70 MiB, which are not the model's
    keep_freed_memory()
    torch.optim.Adam([torch.zeros(1)])
    before, model = peak_memory_mib(workload.device), make()
    training = model_steps(model, workload)["training"]
    for _ in range(3):
        training()
    peak = process = peak_memory_mib(workload.device)
    if workload.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(workload.device)
        process = (total - free) / MIB

    # then what needs a forward pass alone
    images = workload.images()

    def forward():
        with workload.autocast():
            return model.train()(images)
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "gflop_per_image": forward_flops(model, workload.image_size) / 1e9,
            "saved_mib_per_image": saved_bytes(forward) / workload.batch_size / MIB,
            "training_mib": peak - before, "process_mib": process}


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
        from_parameter = isinstance(getattr(node, "variable", None), nn.Parameter)
        if not from_parameter and not isinstance(t, nn.Parameter):
            # held, so that no address is used twice
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
