"""Train one model, or the nine rows of the original table (--arch all), on a folder or zip of images or on a drawn demo.

python train.py --arch vit_cnn --patch 24
python train.py --arch convmixer --patch 24 --data dogs-vs-cats.zip
"""
from mixer.runtime import signals

if __name__ == "__main__":
    signals.listen()  # before torch, which takes seconds to import

import contextlib
import dataclasses
import datetime
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from kernels import fuse, sync_batch_norm, why_not_triton
from mixer.data.batches import Subset, fits_on, split
from mixer.data.demo import Demo
from mixer.data.images import find_images
from mixer.data.packed import cache_folder, pack, usable
from mixer.experiments import ROWS, row_name
from mixer.models import create_model
from mixer.report.figures import draw_comparison, draw_curves
from mixer.report.runs import comparison_table, summarise
from mixer.runtime.cli import run
from mixer.runtime.device import environment, explain_out_of_memory, pick_amp, pick_device
from mixer.runtime.distributed import process_group, rank_and_size
from mixer.runtime.errors import InputError, Interrupted, printable
from mixer.runtime.files import locked, read_csv, writable_folder, write_json, write_text
from mixer.runtime.processes import call
from mixer.training.config import DEMO, MODEL_OPTIONS, as_arguments, read_config
from mixer.training.resume import check_identity, find_checkpoint, resume_identity
from mixer.training.trainer import Trainer, try_one_batch


def main(argv):
    config = read_config(argv, __doc__)
    options = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    print("config:", printable(", ".join(f"{key} {value}" for key, value in options.items())))
    if config.data is None:
        print(f"no --data: training on drawn cats and dogs, with demo-sized settings ({', '.join(f'{k} {v}' for k, v in DEMO.items())})")
    device = pick_device(config.device)
    pick_amp(config.amp, device)
    if config.kernels == "triton" and (reason := why_not_triton(device)):
        raise InputError(f"--kernels triton: {reason}; --kernels auto takes what there is")
    print(f"device: {device}" + ("" if config.device != "auto" or device.type == "cuda" else " (no CUDA device here)"), flush=True)
    if config.arch == "all":
        with claimed(config, rank_and_size()[0]) as out:
            train_all(config, out, device, rank_and_size()[0])
    else:
        with process_group(device, row_name(config.arch, config.patch, config.depth)) as world, claimed(config, world.rank) as out:
            train_one(config, out, device, world)


@contextlib.contextmanager
def claimed(config, rank=0):
    """The folder of the results, writable, locked against a second run; the first process's alone. Raises InputError when it is
    not to be had."""
    name = row_name(config.arch, config.patch, config.depth)
    out = Path(config.out or f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")

    def busy():
        raise InputError(f"--out: another process is training in {out}")
    if rank:
        yield out
        return
    with locked(writable_folder(out, "--out") / ".lock", busy):
        if (out / "config.json").exists() and config.resume != "auto":
            raise InputError(f"--out: {out} holds another run; --resume auto goes on with it, another --out starts afresh")
        yield out


def load_data(config, images, out, device, world):
    """(training Subset, validation Subset, what split.json says), decoded, on `device` where they fit."""
    array, faults = pack(images, config.image_size, config.cache, config.workers)
    good = usable(images, faults, config.bad_images, out / "bad_images.csv" if world.rank == 0 else None)
    rows = split(images, good, config.val_fraction, config.seed)
    said = {"seed": config.seed, "val_fraction": config.val_fraction, "classes": images.classes,
            **{part: [images.names[i] for i in indices] for part, indices in zip(("train", "val"), rows)}}
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    if world.broadcast(digest) != digest:
        raise InputError(f"--data: process {world.rank} finds other images in {images.path} than process 0")
    tensor, labels = torch.from_numpy(array), torch.tensor(images.labels)
    if fits_on(device, tensor.nbytes, config.data_on_device):
        tensor, labels = tensor.to(device), labels.to(device)
    train, val = (Subset(tensor, labels, indices) for indices in rows)
    print(f"{len(train):,} training and {len(val):,} validation images, {tensor.nbytes / 2**20:,.0f} MiB in "
          f"{'GPU memory' if tensor.device.type == 'cuda' else 'a memory-mapped file'}", flush=True)
    if len(train) < config.batch_size:
        raise InputError(f"--batch-size {config.batch_size} is more than the {len(train):,} training images")
    return train, val, said


def train_one(config, out, device, world):
    """One model, from data to summary.json. What can be wrong is looked at first, what is quick before what is slow."""
    start = time.perf_counter()
    name = row_name(config.arch, config.patch, config.depth)
    checkpoint = world.broadcast(find_checkpoint(config.resume, out) if world.rank == 0 else None)
    cache_folder(config.cache)
    images = Demo() if config.data is None else find_images(config.data)
    identity = resume_identity(config, images.fingerprint)
    if checkpoint:
        check_identity(checkpoint, identity)
    print(images, flush=True)
    torch.manual_seed(config.seed)
    with explain_out_of_memory(config, device):
        model = create_model(config.arch, image_size=config.image_size, num_classes=len(images.classes),
                             **{option: getattr(config, option) for option in MODEL_OPTIONS}).to(device)
    kernels = pick_kernels(config.kernels, model, device)
    if config.sync_bn and world.size > 1:
        sync_batch_norm(model)
    try_one_batch(model, config, device, world)
    train, val, split_said = load_data(config, images, out, device, world)
    print(f"kernels: {kernels}")
    trainer = Trainer(model, train, val, config, out, device=device, classes=len(images.classes), identity=identity, world=world)
    if checkpoint:
        trainer.resume(checkpoint)
        print(f"resumed at step {trainer.state.step:,}")
    if trainer.state.step >= trainer.steps and world.broadcast((out / "summary.json").exists()):
        print(f"{name} is trained already, to step {trainer.state.step:,}: nothing to do")
        return
    parameters = sum(p.numel() for p in model.parameters())
    if world.rank == 0:
        write_json(out / "split.json", split_said)
        write_json(out / "config.json", dataclasses.asdict(config))
        write_json(out / "environment.json", {**environment(device), "processes": world.size})
    print(f"{name}: {parameters:,} parameters, {trainer.steps:,} steps of {config.batch_size} images"
          f"{f' in {world.size} processes' if world.size > 1 else ''}, into {printable(out)}", flush=True)

    state = trainer.fit()
    if world.rank:
        return
    summary = summarise(name, config, state, parameters=parameters, steps=trainer.steps,
                        dtype=str(trainer.amp or torch.float32).removeprefix("torch."), data=str(images), classes=images.classes)
    draw_curves(out / "curves.png", state.rows, name)
    write_json(out / "summary.json", summary)
    part = "train" if summary["val_acc"] is None else "val"
    acc = summary[f"{part}_acc"]
    print(f"{name}: final {part} accuracy {acc:.3f} after {(time.perf_counter() - start) / 60:.1f} minutes; "
          f"summary.json, log.csv, curves.png and last.pt are in {printable(out)}")
    if config.require_acc is not None and acc < config.require_acc:
        raise RuntimeError(f"{part} accuracy {acc:.3f} is below --require-acc {config.require_acc}")


def pick_kernels(choice, model, device):
    """What --kernels does: fuse what can be, unless `choice` is "torch". Returns what was done and why, in words."""
    if choice == "torch":
        return "plain PyTorch (--kernels torch)"
    try:
        count = fuse(model)
    except ValueError:
        return f"plain PyTorch ({type(model).__name__} has no depthwise conv + GELU + BatchNorm)"
    why_not = why_not_triton(device)
    if why_not is None:
        return f"{count} depthwise units fused, in Triton"
    return f"{count} depthwise units fused, {'on the CPU' if device.type == 'cpu' else 'in plain PyTorch'} ({why_not})"


def train_all(config, out, device, rank):
    """The nine rows one after another, each in a process of its own, so that none inherits another's memory or failure."""
    results, logs, failed, stopped = {}, {}, 0, None
    if rank == 0:
        write_json(out / "config.json", dataclasses.asdict(config))
    for row in ROWS:
        print(f"\n{row.title}", flush=True)
        folder = out / row.name
        code = call([sys.executable, __file__, *as_arguments(config, arch=row.arch, out=folder, resume="auto", **row.options)])
        if code == 0 and rank == 0:
            results[row.name] = json.loads((folder / "summary.json").read_text())
            logs[row.name] = read_csv(folder / "log.csv")
        if signum := signals.pending() or (code - 128 if code - 128 in signals.STOPPING else None):
            stopped = Interrupted(signum, f" in {row.title}; go on with --arch all --out {out} --resume auto")
            break
        if code:
            failed += 1
            results[row.name] = f"failed (exit code {code})"
            print(f"{row.title} failed with exit code {code}; going on", file=sys.stderr, flush=True)
    if rank == 0:
        table = comparison_table(results, environment(device))
        write_text(out / "table.md", table)
        draw_comparison(out, logs)
        print(f"\n{table}\n{len(logs)} of {len(ROWS)} rows done; {printable(out)}/table.md, loss.png, acc.png")
    if stopped:
        raise stopped
    if failed:
        raise RuntimeError(f"{failed} of {len(ROWS)} rows failed; --resume auto tries these again")


if __name__ == "__main__":
    run(main, sys.argv[1:])
