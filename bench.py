"""Measure what the models and the kernels take on this machine: time, memory, FLOPs, beside the machine's own limits.

python bench.py
python bench.py --rows convmixer-p24,vit_cnn-p24 --peers
python bench.py --data dogs-vs-cats.zip --out results/here
python bench.py --kernels-table
"""
from mixer.runtime import signals

if __name__ == "__main__":
    signals.listen()  # before torch, which takes seconds to import

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kernels import why_not_triton
from mixer.bench.block import measure_kernels
from mixer.bench.candidates import build
from mixer.bench.data import measure_data
from mixer.bench.measure import Load, largest_batch, say
from mixer.bench.rows import measure_peers, measure_rows
from mixer.data.images import find_images
from mixer.experiments import ROWS
from mixer.models import model_options
from mixer.report import tables
from mixer.report.figures import draw_memory, draw_speed
from mixer.runtime.cli import did_you_mean, option, parse, run, invalid_values
from mixer.runtime.device import environment, pick_amp, pick_device
from mixer.runtime.distributed import rank_and_size
from mixer.runtime.errors import InputError, UsageError
from mixer.runtime.files import writable_folder, write_csv, write_json, write_text
from mixer.runtime.processes import attempt


@dataclass(frozen=True)
class Config:
    """Every option of bench.py."""

    rows: str | None = option(None, "which of the nine rows, with commas between; default: all, as resnet18,convmixer-p24")
    peers: bool = option(False, "also what you would otherwise take, from torchvision and timm, eager and compiled, in turn with ours")
    data: str | None = option(None, "image folder or zip: also how fast it is decoded, packed, read and augmented")
    max_batch: float | None = option(None, "also the largest batch that trains in so many GB of GPU memory", above=0)
    kernels_table: bool = option(False, "instead: the fused depthwise block against plain PyTorch, eager and compiled")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: the GPU where there is one")
    batch_size: int | None = option(None, "images per step; default: the original's 250, on a CPU 8", least=2)
    image_size: int = option(192, "pixels square", least=1)
    amp: str = option("auto", "autocast dtype; auto: fp16 on CUDA, off on the CPU", choices=("auto", "fp16", "bf16", "off"))
    compile: bool = option(False, "torch.compile the models")
    kernels: str = option("auto", "ConvMixer's depthwise unit: fused (auto; triton: in Triton or not at all) or in plain PyTorch",
                          choices=("auto", "torch", "triton"))
    repeats: int = option(12, "times that each thing is taken, in turn with what it is compared to", least=3)
    out: str | None = option(None, "folder for csv, json, markdown and figures; default: print only")
    debug: bool = option(False, "show a traceback when something fails")


FOR_MODELS = {"rows", "peers", "data", "max_batch", "batch_size", "image_size", "compile", "kernels"}  # no --kernels-table with these


def main(argv):
    config, rows, device = read_config(argv)
    out = config.out and writable_folder(config.out, "--out")
    lists = (measure_kernels if config.kernels_table else measure_models)(config, rows, device)
    told = {**dataclasses.asdict(config), "out": None, "data": config.data and Path(config.data).name}  # a result tells of no folders
    result = {"environment": environment(device), "config": told, **lists}
    text = (tables.kernels_text if config.kernels_table else tables.bench_text)(result)
    print(text)
    if out:
        name = "kernels" if config.kernels_table else "bench"
        write_json(out / f"{name}.json", result)
        write_text(out / f"{name}.md", text)
        for part, measured in lists.items():
            write_csv(out / f"{part}.csv", flat(measured))
        if lists.get("memory"):
            caption = text.split("\n\n")[0]
            draw_speed(out / "speed.png", [row for row in lists["models"] if "failed" not in row], caption)
            draw_memory(out / "memory.png", lists["memory"], caption)
    failed = sum("failed" in row for measured in lists.values() for row in measured)
    if failed:
        raise RuntimeError(f"{failed} of the measurements failed; the tables say why")


def read_config(argv):
    """argv -> Config with its defaults filled in, the rows to measure, the device. Raises InputError naming all that is wrong."""
    given, wrong = parse(Config, argv, __doc__)
    config = Config(**given)
    wrong += invalid_values(config)
    names = {row.name: row for row in ROWS}
    asked = config.rows.split(",") if config.rows else list(names)
    wrong += [f"--rows: there is no {name}{did_you_mean(name, names)}; there are {', '.join(names)}" for name in asked if name not in names]
    rows = [names[name] for name in asked if name in names]
    for row in [] if wrong else rows:
        try:
            model_options(row.arch, config.image_size, **row.options)
        except ValueError as e:
            wrong.append(f"--image-size does not suit {row.name}: {e}; --rows takes others")
    if config.kernels_table:
        wrong += [f"--{name.replace('_', '-')} is of the models' table, not of --kernels-table" for name in given if name in FOR_MODELS]
    if rank_and_size()[1] > 1:
        wrong.append("bench.py measures a single process: start it without torchrun")
    if wrong:
        raise UsageError(wrong)
    device = pick_device(config.device)
    amp = pick_amp(config.amp, device)
    if config.kernels == "triton" and (reason := why_not_triton(device)):
        raise InputError(f"--kernels triton: {reason}; --kernels auto takes what there is")
    if config.max_batch and device.type != "cuda":
        raise InputError("--max-batch: only the memory of a GPU can be given out so exactly; this device is the CPU")
    if config.max_batch and config.max_batch * 1e9 > torch.cuda.get_device_properties(device).total_memory:
        raise InputError(f"--max-batch {config.max_batch:g}: {torch.cuda.get_device_name(device)} has less memory")
    if config.data:
        find_images(config.data)  # now, not after the models
    amp = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "off"}[amp]
    return dataclasses.replace(config, amp=amp, batch_size=config.batch_size or (250 if device.type == "cuda" else 8)), rows, device


def measure_models(config, rows, device):
    """{list: its rows}: the nine rows of the table, their memory over batch sizes, and what else was asked for."""
    load = Load(config.batch_size, config.image_size, device, pick_amp(config.amp, device))
    makes = {row.title: partial(build, row.arch, row.options, config.image_size, device, config.kernels, config.compile) for row in rows}
    models, memory = measure_rows(config, makes, load)
    lists = {"models": models, "memory": memory}
    if config.peers:
        lists["peers"] = measure_peers(config, rows, load)
    if config.max_batch:
        lists["largest"] = []
        for title, make in makes.items():
            say(f"the largest batch of {title}")
            found, failed = attempt(largest_batch, make, load, int(config.max_batch * 1e9), debug=config.debug)
            lists["largest"].append({"row": title, "batch_size": config.batch_size, "largest_batch": found, **failed})
    if config.data:
        say(config.data)
        stages, failed = attempt(measure_data, config.data, load, config.repeats, debug=config.debug)
        lists["data"] = stages or [{"stage": Path(config.data).name, "batch_size": config.batch_size, **failed}]
    return lists


def flat(rows):
    """Rows for a csv file: the same keys in each, shapes as words."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: tables.shape_text(row[key]) if key == "shape" else row.get(key) for key in keys} for row in rows]


if __name__ == "__main__":
    run(main, sys.argv[1:])
