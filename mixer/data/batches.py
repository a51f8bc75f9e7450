"""A subset of the images, and the batches of training, in a reproducible order.

Everything random is a function of (seed, epoch, sample), not of workers, batches or restarts.
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch

from .augment import augmentations, to_device


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
        return to_device(images, device), to_device(self.labels[indices], device)


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of samples 0 .. count - 1 in an epoch: a permutation, int64 (count,)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def training_batch(step: int, count: int, config) -> tuple[np.ndarray, np.ndarray]:
    """The samples of batch `step` (from 0), int64 (B,), and their augmentations (B,).

    config: train.py's. The shuffled epochs of `count` samples follow one another, and this sequence
    is cut into batches. So a batch may hold the end of one epoch and the start of the next: all
    batches are full, and every image comes once per epoch.
    """
    # positions in an endless sequence of epochs
    samples, augmentation, first = [], [], step * config.batch_size
    epochs, positions = np.divmod(np.arange(first, first + config.batch_size), count)
    # in each epoch, its own order and its own random numbers
    for epoch in np.unique(epochs).tolist():
        samples.append(order(config.seed, epoch, count)[positions[epochs == epoch]])
        augmentation.append(augmentations(config, epoch, count)[samples[-1]])
    return np.concatenate(samples), np.concatenate(augmentation)
