"""How fast a training step is fed: decoding into one file, reading, augmenting."""
import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..data.augment import augment
from ..data.batches import Subset, fits_on, training_batch
from ..data.cache import decode_to_cache
from ..data.images import find_images
from .timing import race

MOST_IMAGES = 2000  # evenly spaced
BATCHES = 16  # in each repeat: one batch is too short to time


def measure_data(path: Path | str, image_size: int, batch_size: int, device: torch.device,
                 repeats: int) -> list[dict]:
    """The images/s of each stage, on at most MOST_IMAGES of the images at `path`."""
    images = find_images(path)
    chosen = np.linspace(0, len(images) - 1, min(MOST_IMAGES, len(images))).astype(int)
    images = dataclasses.replace(images, **{
        name: [getattr(images, name)[i] for i in chosen]
        for name in ("files", "names", "labels", "splits", "stamps")})
    with tempfile.TemporaryDirectory() as folder:
        def decode_all():
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                return decode_to_cache(images, image_size, cache)

        # the images that are not damaged
        array, faults, _ = decode_all()
        indices = np.setdiff1d(np.arange(len(images)), list(faults))
        place = device if fits_on(device, array.nbytes) else "cpu"
        subset = Subset(torch.from_numpy(array).to(place), torch.tensor(images.labels).to(place),
                        indices)

        def next_batch():
            return training_batch(next(step), batch_size, len(subset), seed=0)

        # what happens once, then what happens in every step
        step = itertools.count()
        images_of_batch, _ = subset.batch(next_batch()[0], device)
        times = race({"decoding, all cores": decode_all}, repeats, device)
        times |= race({"reading a batch": lambda: subset.batch(next_batch()[0], device),
                       "augmenting it": lambda: augment(images_of_batch, next_batch()[1])},
                      repeats, device, BATCHES)
    counts = len(images), batch_size, batch_size  # images of a call
    return [{"stage": stage, "images_per_s": 1000 * count / t["ms"], "p20": 1000 * count / t["p80"],
             "p80": 1000 * count / t["p20"]}
            for (stage, t), count in zip(times.items(), counts, strict=True)]
