"""How fast a training step is fed: decoding into one file, reading, augmenting."""
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..data.augment import augment
from ..data.batches import Subset, training_batch
from ..data.cache import decode_to_cache
from ..data.images import find_images
from ..data.split import to_tensors
from ..training.config import Config
from .timing import race

MOST_IMAGES = 2000  # evenly spaced
BATCHES = 16  # in each repeat: one batch is too short to time


def measure_data(path: Path | str, image_size: int, batch_size: int, device: torch.device,
                 repeats: int) -> list[dict]:
    """The images/s of each stage, on at most MOST_IMAGES of the images at `path`."""
    images = find_images(path)
    step = math.ceil(len(images) / MOST_IMAGES)
    for name in ("files", "names", "labels", "splits", "stamps"):
        setattr(images, name, getattr(images, name)[::step])

    def decode_all():
        with tempfile.TemporaryDirectory() as cache:  # the array stays when its file is removed
            return decode_to_cache(images, image_size, cache)

    # the images that are not damaged
    array, faults, _ = decode_all()
    indices = np.setdiff1d(np.arange(len(images)), list(faults))
    subset = Subset(*to_tensors(array, images.labels, device), indices)

    def next_batch():
        return training_batch(next(steps), len(subset), Config(batch_size=batch_size))

    # what happens once, then what happens in every step
    steps = itertools.count()
    images_of_batch, _ = subset.batch(next_batch()[0], device)
    times = race({"decoding, all cores": decode_all}, repeats, device)
    times |= race({"reading a batch": lambda: subset.batch(next_batch()[0], device),
                   "augmenting it": lambda: augment(images_of_batch, next_batch()[1])},
                  repeats, device, BATCHES)
    counts = len(images), batch_size, batch_size  # images of a call
    return [{"stage": stage, "images_per_s": 1000 * count / t["ms"], "p20": 1000 * count / t["p80"],
             "p80": 1000 * count / t["p20"]}
            for (stage, t), count in zip(times.items(), counts, strict=True)]
