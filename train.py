"""Train one model, or all models of the comparison (--arch all), with one or more seeds.

The images come from a folder or a zip. Without --data, they are a synthetic demo. The loop is in
mixer/training/trainer.py.

python train.py --arch vit_cnn --patch 24
python train.py --arch convmixer --patch 24 --data dogs-vs-cats.zip
"""
import contextlib
import datetime
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import torch

from kernels import fuse
from mixer.data.demo import drawn_images
from mixer.data.images import describe, find_images
from mixer.data.split import load_data
from mixer.experiments import row_name, seed_folder
from mixer.models import create_model
from mixer.report.figures import draw_curves
from mixer.report.pictures import write_pictures
from mixer.report.runs import summarise
from mixer.runtime.cli import run
from mixer.runtime.device import dtype_name, environment, pick_amp, pick_device
from mixer.runtime.distributed import process_group, rank_and_size
from mixer.runtime.errors import InputError, printable
from mixer.runtime.files import claimed_folder, write_csv, write_json
from mixer.training.checkpoint import (
    checkpoint_to_resume,
    describe_model,
    init_from_checkpoint,
    run_identity,
)
from mixer.training.config import read_config
from mixer.training.evaluate import predict
from mixer.training.several import train_all
from mixer.training.trainer import State, Trainer


def main(argv):
    # the options
    config, runs = read_config(argv, __doc__)
    print(textwrap.fill(printable(f"config: {config}"), 100))
    name = row_name(config.arch, config.patch, config.depth)
    out = Path(config.out or f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")

    # the device and the dtype
    device = pick_device(config.device)
    amp = pick_amp(config.amp, device)
    print(f"device: {device}, dtype: {dtype_name(amp)}", flush=True)

    # one run, or several
    rank, _ = rank_and_size()
    ranks = (contextlib.nullcontext() if runs
             else process_group(device, seed_folder(name, config.seed)))
    with ranks as world, claimed_folder(out, config.resume, rank):
        if not runs:
            train_one(config, name, out, device, amp, world)
            return
        if rank == 0:
            write_json(out / "config.json", vars(config))
        train_all([sys.executable, __file__], runs, out, rank)


def train_one(config, name, out, device, amp, world):
    """Train one model, from images to summary.json."""
    start = time.perf_counter()

    # the images
    images = drawn_images() if config.data is None else find_images(config.data)
    if "val" in images.splits:
        if config.val_fraction is not None:
            raise InputError(f"--val-fraction: {images.path} comes with a validation set; leave it "
                             "out")
    elif config.val_fraction is None:
        config = replace(config, val_fraction=0.1)
    train_set, val_set, splits, contents = load_data(config, images, out, device, world)

    # the model, and the checkpoint that it goes on from
    torch.manual_seed(config.seed)
    model = create_model(config.arch, image_size=config.image_size,
                         num_classes=len(images.classes), **config.model_options).to(device)
    description = describe_model(config, images.classes)
    identity = run_identity(config, images.key, contents)
    checkpoint = checkpoint_to_resume(config.resume, out, identity, world)
    if checkpoint and config.init_from:
        print("--init-from ignored: resuming from the checkpoint")
    elif config.init_from and world.rank == 0:  # the other ranks take its weights over
        print(init_from_checkpoint(config.init_from, model, images.classes))
    if config.sync_bn and world.size > 1:  # such a model is not fused
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fused = 0
    with contextlib.suppress(ValueError):  # there is nothing to fuse
        fused = fuse(model) if config.kernels == "auto" else 0
    print("kernels:", f"{fused} depthwise units fused" if fused else "plain PyTorch")

    # the step that it starts at
    step = checkpoint["state"]["step"] if checkpoint else 0
    if step >= config.steps:
        if world.broadcast((out / "summary.json").exists()):
            print(f"{name} is trained already, to step {step:,}: nothing to do")
            return
        if not step == config.steps == State(**checkpoint["state"]).logged_step():
            raise InputError(f"--steps {config.steps}: the checkpoint is at step {step:,} already")
    if checkpoint:
        print(f"resumed at step {step:,}")

    # write what is known of the run
    parameters = sum(p.numel() for p in model.parameters())
    if world.rank == 0:
        (out / "summary.json").unlink(missing_ok=True)  # a shorter run's
        write_json(out / "split.json", splits)
        write_json(out / "config.json", vars(config))
        if checkpoint:  # kill -9 may have come between last.pt and the log
            write_csv(out / "log.csv", checkpoint["state"]["log"])
        write_json(out / "environment.json", {**environment(device), "processes": world.size})
    processes = f" in {world.size} processes" if world.size > 1 else ""
    print(f"{name}: {parameters:,} parameters, {config.steps:,} steps of "
          f"{config.batch_size} images{processes}\ninto {printable(out)}", flush=True)

    # train
    trainer = Trainer(model, train_set, val_set, config, out, device=device, amp=amp,
                      description=description, identity=identity, world=world)
    if checkpoint:
        trainer.resume(checkpoint)
    trainer.fit()
    if world.rank == 0:
        write_results(trainer, name, images, parameters, (time.perf_counter() - start) / 60)


def write_results(trainer, name, images, parameters, minutes):
    """Write summary.json, then the pictures."""
    config, out, state, val_set = trainer.config, trainer.out, trainer.state, trainer.val_set
    # summary.json
    summary = summarise(name, config, state, parameters=parameters, classes=images.classes,
                        data=describe(images), dtype=dtype_name(trainer.amp))
    write_json(out / "summary.json", summary)

    # curves, filters, attention, and what the model got wrong
    draw_curves(out / "curves.png", state.log, name)
    probabilities = None
    if len(val_set):
        probabilities = predict(trainer.model, val_set, config.batch_size, trainer.device,
                                trainer.amp).softmax(1)
    write_pictures(out, trainer.model, name, val_set, [images.files[i] for i in val_set.indices],
                   trainer.device, probabilities, images.classes)
    subset = "train" if summary["val_acc"] is None else "val"
    print(f"final {subset} accuracy {summary[f'{subset}_acc']:.3f} after {minutes:.1f} minutes, "
          f"in {printable(out)}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
