"""How fast a training step is fed: decoding, packing, reading, augmenting."""
import dataclasses
import tempfile

import numpy as np
import torch

from ..data.augment import augment, draws_for
from ..data.batches import Subset, fits_on
from ..data.images import find_images
from ..data.packed import pack
from ..runtime.errors import InputError
from .timing import race, several


def measure_data(path, load, repeats, most=2000):
    """Images/s of each stage that feeds a training step, on at most `most` of the images at `path`, evenly
    spaced: a dict for each stage. Raises InputError as `find_images` does, and where no image decodes."""
    images = find_images(path)
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    images = dataclasses.replace(images, **{name: [getattr(images, name)[i] for i in chosen]
                                            for name in ("files", "names", "labels", "splits", "sizes")})
    with tempfile.TemporaryDirectory() as folder:
        array, faults = pack(images, load.image_size, folder)
        good = np.setdiff1d(np.arange(len(images)), list(faults))
        if not len(good):
            raise InputError(f"--data: none of {len(images):,} images in {path} decodes: {next(iter(faults.values()))}")
        tensor, labels = torch.from_numpy(array), torch.tensor(images.labels)
        if fits_on(load.device, tensor.nbytes, "auto"):
            tensor, labels = tensor.to(load.device), labels.to(load.device)
        part, random = Subset(tensor, labels, good), np.random.default_rng(0)
        batch, _ = part.batch(np.arange(load.batch_size) % len(good), load.device)
        few = good[::max(1, len(good) // 64)]

        def pack_anew():
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                pack(images, load.image_size, fresh)
        def draw():
            return random.integers(len(good), size=load.batch_size)
        once = {"decoding, one process": lambda: [images.load(i, load.image_size) for i in few], "packing, all cores": pack_anew}
        always = {"reading a batch": lambda: part.batch(draw(), load.device),
                  "augmenting it": lambda: augment(batch, *draws_for(0, np.zeros(load.batch_size, int), draw(), len(good)))}
        times = race(once, repeats, load.device)[0]
        often = 16  # one batch is too short to time
        times |= race({stage: several(way, often) for stage, way in always.items()}, repeats, load.device)[0]
    counts = [len(few), len(images), often * load.batch_size, often * load.batch_size]
    return [{"stage": stage, "images_per_s": 1000 * count / t.median, "p20": 1000 * count / t.p80, "p80": 1000 * count / t.p20}
            for (stage, t), count in zip(times.items(), counts)]
