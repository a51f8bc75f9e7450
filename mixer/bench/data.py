"""How fast a training step is fed: decoding, packing, reading, augmenting."""
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data.augment import augment, draws_for
from ..data.batches import Subset, fits_on
from ..data.images import ImageSet, base_name, find_images
from ..data.packed import pack
from ..report.measurements import StageMeasurement
from ..runtime.errors import InputError
from ..runtime.processes import attempt
from .measure import Load, announce
from .timing import race, repeated

DECODED = 64  # images that one process decodes in each repeat
BATCHES = 16  # in each repeat: one batch is too short to time


class Stage(NamedTuple):
    name: str
    work: Callable[[], object]
    images: int  # that `work` handles


def measure_stages(config, load: Load) -> list[StageMeasurement]:
    """`measure_data` in a fresh process."""
    announce(config.data)
    stages, failed = attempt(measure_data, config.data, load, config.repeats, debug=config.debug)
    return stages or [StageMeasurement(base_name(config.data), batch_size=load.batch_size,
                                       failed=failed)]


def measure_data(path: Path | str, load: Load, repeats: int,
                 most: int = 2000) -> list[StageMeasurement]:
    """The speed of each stage, on at most `most` of the images at `path`, evenly spaced.

    Raises InputError as `find_images` does, and if no image decodes.
    """
    images = find_images(path)
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    images = dataclasses.replace(images, **{
        name: [getattr(images, name)[i] for i in chosen]
        for name in ("files", "names", "labels", "splits", "sizes")})
    with tempfile.TemporaryDirectory() as folder:
        # decode all of them, to leave out the damaged ones
        array, faults, _ = pack(images, load.image_size, folder)
        indices = np.setdiff1d(np.arange(len(images)), list(faults))
        if not len(indices):
            raise InputError(f"--data: none of {len(images):,} images in {path} decodes: "
                             f"{next(iter(faults.values()))}")
        tensor, labels = torch.from_numpy(array), torch.tensor(images.labels)
        if fits_on(load.device, tensor.nbytes, "auto"):
            tensor, labels = tensor.to(load.device), labels.to(load.device)

        # what happens once in turn, then what happens in every step
        results = []
        for stages in (decoding_stages(images, indices, load.image_size, folder),
                       batch_stages(Subset(tensor, labels, indices), load)):
            times, _ = race({stage.name: stage.work for stage in stages}, repeats, load.device)
            for stage in stages:
                median, p20, p80 = (1000 * stage.images / ms for ms in times[stage.name])
                results.append(StageMeasurement(stage.name, median, p20=p80, p80=p20))
    return results


def decoding_stages(images: ImageSet, indices: np.ndarray, size: int, folder: str) -> list[Stage]:
    few = indices[::max(1, len(indices) // DECODED)]

    def decode_few():
        for index in few:
            images.load(index, size)

    def pack_anew():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            pack(images, size, cache)
    return [Stage("decoding, one process", decode_few, len(few)),
            Stage("packing, all cores", pack_anew, len(images))]


def batch_stages(subset: Subset, load: Load) -> list[Stage]:
    random, epochs = np.random.default_rng(0), np.zeros(load.batch_size, int)
    batch, _ = subset.batch(np.arange(load.batch_size) % len(subset), load.device)

    def samples():
        return random.integers(len(subset), size=load.batch_size)

    def read():
        subset.batch(samples(), load.device)

    def augment_batch():
        augment(batch, *draws_for(0, epochs, samples(), len(subset)))
    return [Stage("reading a batch", repeated(read, BATCHES), BATCHES * load.batch_size),
            Stage("augmenting it", repeated(augment_batch, BATCHES), BATCHES * load.batch_size)]
