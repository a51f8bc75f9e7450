"""Which images, in which order: the split, one part of it, and the training stream.

Everything random is a function of (seed, epoch, sample): nothing depends on workers, batch boundaries or restarts.
"""
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.errors import InputError


def split(images, good, val_fraction, seed):
    """Of the indices `good`, those for training and those for validation: two sorted int64 arrays.

    As the source says where it has train/ and val/. Otherwise every class gives round(val_fraction * its images), at
    least one, chosen by a hash of (seed, name): the split depends on names and seed only, and images that join later
    move few of those already there. Raises InputError when a class has too few images for that.
    """
    parts, labels = np.array(images.splits)[good], np.array(images.labels)[good]
    if "val" in parts:
        return good[parts != "val"], good[parts == "val"]
    val = []
    for label, name in enumerate(images.classes if val_fraction else []):
        members = good[labels == label]
        if len(members) < 2:
            raise InputError(f"--data: class {name} has a single image, which cannot be both in training and in validation: "
                             "add images, or take --val-fraction 0")
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        val += sorted(members, key=lambda i: hashlib.sha256(f"{seed}/{images.names[i]}".encode(errors="surrogateescape")).digest())[:count]
    val = np.array(sorted(val), dtype=np.int64)
    return np.setdiff1d(good, val), val


def fits_on(device, size, choice):
    """Whether `size` bytes of images go into the memory of `device`; choice: auto (below half of what is free), yes, no."""
    if device.type == "cpu" or choice == "no":
        return False
    return choice == "yes" or size < torch.cuda.mem_get_info(device)[0] / 2


@dataclass
class Subset:
    """The training or the validation images: uint8 (N, S, S, 3), int64 labels (N,), and the rows that belong to it."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray

    def __len__(self):
        return len(self.indices)

    def batch(self, samples, device):
        """Samples (positions within this part) -> uint8 (B, S, S, 3) and int64 (B,), on `device`."""
        rows = torch.from_numpy(self.indices[samples])
        if self.images.device.type == "cpu" and device.type == "cuda":
            return (self.images.index_select(0, rows).pin_memory().to(device, non_blocking=True),
                    self.labels[rows].pin_memory().to(device, non_blocking=True))
        rows = rows.to(self.images.device, non_blocking=True)
        return self.images.index_select(0, rows), self.labels[rows]  # on a CPU six times as fast as images[rows]


class Stream:
    """The endless training stream: every epoch a permutation keyed by (seed, epoch), cut into full batches.

    A batch may reach into the next epoch, so none is ever short or dropped, and every image comes once an epoch.
    """

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.orders = {}

    def order(self, epoch):
        """The permutation of epoch `epoch`; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self.orders[epoch]

    def batch(self, step):
        """Step (from 0) -> two int64 arrays (B,): the epoch and the sample at each place of the batch."""
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.count)
        samples = np.concatenate([self.order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return epochs, samples

    def steps(self, epochs):
        """Steps that show every image `epochs` times."""
        return math.ceil(epochs * self.count / self.batch_size)
