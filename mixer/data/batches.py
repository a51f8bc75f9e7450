"""Which images, in which order: the split, a subset, and the training stream.

Everything random is a function of (seed, epoch, sample), not of workers, batches or restarts.
"""
import functools
import hashlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.errors import InputError, listed, printable
from .images import ImageSet


def split(images: ImageSet, indices: np.ndarray, digests: list[str | None], val_fraction: float,
          seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the images `indices` into training and validation: two sorted int64 arrays.

    If the data set comes with train and val folders, they are used. Otherwise a hash of (seed,
    name) picks round(val_fraction * n), at least one, of the n images of each class. So the split
    depends on names and seed only, and adding images moves few of the others. Images with equal
    `digests` are never on both sides: they move together, and where the source decides, training
    goes without its copies of validation images. Raises InputError when a class has too few images.
    """
    # images that are equal: one group, in the order of its first name
    groups = defaultdict(list)
    for index in indices:
        groups[digests[index]].append(index)
    copies = [group for group in groups.values() if len(group) > 1]
    labels, splits = np.array(images.labels), np.array(images.splits)
    if copies:
        mixed = sum(len(group) for group in copies if len(set(labels[group])) > 1)
        print(f"{sum(map(len, copies)):,} images are byte-identical to another, and stay together"
              f"{f'; {mixed:,} of them have copies of another class' if mixed else ''}", flush=True)

    # by the source
    if "val" in images.splits:
        val = indices[splits[indices] == "val"]
        in_val = {digests[index] for index in val}
        train = np.array([index for index in indices if digests[index] not in in_val], dtype=int)
        if left_out := len(indices) - len(train) - len(val):
            print(f"{left_out:,} training images left out, which are validation images, too")
        lost = set(images.labels) - set(labels[train])
        if lost:
            raise InputError("--data: no training image is left of class "
                             f"{listed(images.classes[label] for label in sorted(lost))}: they are "
                             "copies of validation images")
        return train, val
    if val_fraction == 0:
        return indices, np.array([], dtype=np.int64)

    # by a hash
    def key(group):
        text = f"{seed}/{images.names[group[0]]}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    val = []
    for label, name in enumerate(images.classes):
        total = int((labels[indices] == label).sum())
        if total < 2:
            raise InputError(f"--data: class {name} has a single image, which cannot be both in "
                             "training and in validation: add images, or use --val-fraction 0")
        # what is equal to an image of another class stays in training
        of_class = [group for group in groups.values() if (labels[group] == label).all()]
        count, chosen = min(max(1, round(val_fraction * total)), total - 1), []
        for group in sorted(of_class, key=key):
            if len(chosen) + len(group) <= count:
                chosen += group
        if not chosen:
            print(f"class {printable(name)} is not in validation: its images are copies of each "
                  "other, or of other classes' images", flush=True)
        val += chosen
    val = np.array(sorted(val), dtype=np.int64)
    return np.setdiff1d(indices, val), val


def fits_on(device: torch.device, size: int) -> bool:
    """Whether to keep `size` bytes of images on a GPU: in half of its free memory."""
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2


@dataclass
class Subset:
    """The training or the validation images: `indices` (M,) into all images and labels."""

    images: torch.Tensor   # uint8 (N, S, S, 3)
    labels: torch.Tensor   # int64 (N,)
    indices: np.ndarray

    def __len__(self):
        return len(self.indices)

    def batch(self, positions: np.ndarray,
              device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in this subset (B,) -> uint8 (B, S, S, 3) and int64 (B,), on `device`."""
        indices = torch.from_numpy(self.indices[positions])
        indices = indices.to(self.images.device, non_blocking=True)
        images = self.images.index_select(0, indices)  # six times as fast as [] on a CPU
        batch = images, self.labels[indices]
        if images.device.type == device.type:
            return batch
        if device.type != "cuda":
            return tuple(tensor.to(device) for tensor in batch)
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of samples 0 .. count - 1 in an epoch: a permutation, int64 (count,)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass
class Stream:
    """The endless training stream: the epochs' permutations of `count` samples, in full batches.

    A batch may reach into the next epoch, so none is short, and every image comes once per epoch.
    """

    count: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Step (from 0) -> the epoch and the sample of each image of the batch, int64 (B,)."""
        first = step * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.count)
        samples = [order(self.seed, int(epoch), self.count)[places[epochs == epoch]]
                   for epoch in np.unique(epochs)]
        return epochs, np.concatenate(samples)
