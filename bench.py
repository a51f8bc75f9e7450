"""Measure time, memory and FLOPs of the models and kernels.

python bench.py
python bench.py --rows convmixer-p24,vit_cnn-p24 --peers
python bench.py --arch convmixer --patch 12 --depth 2
python bench.py --data dogs-vs-cats.zip --out results/here
python bench.py --image-size 192,288,384
python bench.py --kernels-table
"""
import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mixer.bench.measure import measure_models
from mixer.bench.unit import measure_kernels
from mixer.data.images import find_images
from mixer.experiments import ROWS, Row
from mixer.models import MODELS, model_options
from mixer.report.measurements import measured_text
from mixer.runtime.cli import flag, option, parse, parse_names, run, whole_numbers
from mixer.runtime.device import DTYPES, environment, pick_amp, pick_device
from mixer.runtime.errors import InputError
from mixer.runtime.files import writable_folder, write_json, write_text
from mixer.training.config import MODEL_OPTIONS
from mixer.training.config import Config as TrainConfig

AMP_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# --patch and the like, as in train.py
ModelOptions = dataclasses.make_dataclass("ModelOptions", [
    (field.name, field.type, dataclasses.field(default=None, metadata=field.metadata))
    for field in dataclasses.fields(TrainConfig) if field.name in MODEL_OPTIONS], frozen=True)


@dataclass(frozen=True)
class Config(ModelOptions):
    """Every option of bench.py."""

    arch: str | None = option(None, "one model, with the options above, instead of the rows",
                              choices=tuple(MODELS))
    rows: str | None = option(None, "some of the rows, e.g. resnet18,convmixer-p24; default: all")
    peers: bool = option(False, "also the torchvision and timm versions, eager and compiled")
    data: str | None = option(None, "image folder or zip; also benchmark loading and augmentation, "
                              "at the first image size")
    kernels_table: bool = option(False, "benchmark the fused unit against plain PyTorch instead")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if there is one")
    batch_size: int | None = option(None, "images per step; default: 250; 8 on a CPU", least=2)
    image_size: str = option("192", "image side in pixels, or a list, e.g. 192,288,384")
    amp: str = option("auto", "autocast dtype; auto: fp16 on CUDA, bf16 on a CPU that has it",
                      choices=("auto", "fp16", "bf16", "off"))
    compile: bool = option(False, "torch.compile the models")
    repeats: int = option(12, "timing repeats per candidate, a multiple of 3; interleaved", least=3)
    out: str | None = option(None, "folder for json and markdown; default: print only")


def main(argv: list[str]) -> None:
    config, rows, device = read_config(argv)
    out = config.out and writable_folder(config.out, "--out")

    # measure
    name, measure = (("kernels", measure_kernels) if config.kernels_table else
                     ("bench", measure_models))
    lists = measure(config, rows, device)

    # save what took minutes; results must not contain local paths
    settings = {**dataclasses.asdict(config), "out": None,
                "data": config.data and Path(config.data).name}
    result = {"environment": environment(device), "config": settings, **lists}
    if out:
        write_json(out / f"{name}.json", result)
    text = measured_text(result)
    print(text)
    if out:
        write_text(out / f"{name}.md", text)
    failed = sum("failed" in row for measured in lists.values() for row in measured)
    if failed:
        raise RuntimeError(f"{failed} of the measurements failed; the tables say why")


def read_config(argv: list[str]) -> tuple[Config, list[Row], torch.device]:
    """argv -> Config with all defaults filled in, the rows to measure, the device.

    image_size becomes a list of numbers. Raises InputError if the arguments are wrong, or if this
    machine or the data cannot serve them.
    """
    # the rows or the model, and whether the image size suits them
    options = parse(Config, argv, __doc__)
    config = Config(**options)
    rows = parse_names("rows", config.rows, {row.name: row for row in ROWS})
    given = {name: options[name] for name in MODEL_OPTIONS if name in options}
    if config.arch:
        title = " ".join([config.arch, *(f"{name} {value}" for name, value in given.items())])
        rows = [Row(title, config.arch, options=given)]
    elif given:
        raise InputError(f"{', '.join(map(flag, given))} needs --arch")
    unused = ["rows"] if config.arch else []
    if config.kernels_table:  # it has shapes and models of its own
        unused += ["peers", "data", "batch_size", "image_size", "compile"]
    if unused := [flag(name) for name in unused if name in options]:
        raise InputError(f"{', '.join(unused)} would have no effect; leave it out")
    sizes = whole_numbers("image_size", config.image_size, least=1)
    for row, side in itertools.product(rows, sizes):
        try:
            model_options(row.arch, side, **row.options)
        except ValueError as e:
            raise InputError(f"{row.title} at --image-size {side}: {e}") from None

    # this machine and the data
    device = pick_device(config.device)
    amp = pick_amp(config.amp, device)
    if config.data:
        find_images(config.data)  # fails now, not after the models
    batch_size = config.batch_size or (250 if device.type == "cuda" else 8)
    config = dataclasses.replace(config, amp=AMP_NAMES[amp], batch_size=batch_size,
                                 image_size=sizes)
    return config, rows, device


if __name__ == "__main__":
    run(main, sys.argv[1:])
