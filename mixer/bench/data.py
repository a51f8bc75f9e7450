"""How fast a training step is fed: decoding, packing, reading, augmenting."""
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..data.augment import augment, augmentations_of_batch
from ..data.batches import Subset, fits_on
from ..data.cache import decode_to_cache
from ..data.images import find_images
from ..runtime.errors import InputError
from .measure import Load
from .timing import race

DECODED = 64  # images that one process decodes in each repeat
BATCHES = 16  # in each repeat: one batch is too short to time


def measure_data(path: Path | str, load: Load, repeats: int, most: int = 2000) -> list[dict]:
    """The images/s of each stage, on at most `most` of the images at `path`, evenly spaced.

    Raises InputError as `find_images` does, and if no image decodes.
    """
    images = find_images(path)
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    images = dataclasses.replace(images, **{
        name: [getattr(images, name)[i] for i in chosen]
        for name in ("files", "names", "labels", "splits", "stamps")})
    with tempfile.TemporaryDirectory() as folder:
        # decode all of them, to leave out the damaged ones
        array, faults, _ = decode_to_cache(images, load.image_size, folder)
        indices = np.setdiff1d(np.arange(len(images)), list(faults))
        if not len(indices):
            raise InputError(f"--data: none of {len(images):,} images in {path} decodes: "
                             f"{next(iter(faults.values()))}")
        tensor, labels = torch.from_numpy(array), torch.tensor(images.labels)
        if fits_on(load.device, tensor.nbytes):
            tensor, labels = tensor.to(load.device), labels.to(load.device)
        few, subset = indices[::max(1, len(indices) // DECODED)], Subset(tensor, labels, indices)
        random, epochs = np.random.default_rng(0), np.zeros(load.batch_size, int)
        batch, _ = subset.batch(np.arange(load.batch_size) % len(subset), load.device)

        def decode():
            for index in few:
                images.load(index, load.image_size)

        def pack_anew():
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                decode_to_cache(images, load.image_size, cache)

        def samples():
            return random.integers(len(subset), size=load.batch_size)

        def read():
            subset.batch(samples(), load.device)

        def augment_batch():
            augment(batch, augmentations_of_batch(0, epochs, samples(), len(subset)))

        # what happens once in turn, then what happens in every step
        times = race({"decoding, one process": decode, "packing, all cores": pack_anew},
                     repeats, load.device)
        times |= race({"reading a batch": read, "augmenting it": augment_batch},
                      repeats, load.device, BATCHES)
    counts = len(few), len(images), load.batch_size, load.batch_size  # images of a call
    return [{"stage": stage, "images_per_s": 1000 * count / t["ms"], "p20": 1000 * count / t["p80"],
             "p80": 1000 * count / t["p20"]}
            for (stage, t), count in zip(times.items(), counts, strict=True)]
