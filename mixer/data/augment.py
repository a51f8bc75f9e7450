"""The original's augmentation on whole batches: flip, small rotation, reflected border; x / 255."""
import functools
import math

import numpy as np
import torch
from torch.nn import functional as F

MAX_ANGLE = 15.0  # degrees
CPU_GROUP = 16    # images augmented at a time: 250 take 40 ms, and 70 ms in one group

# what is done to one image; a batch of them is one array
AUGMENTATION = np.dtype([("flip", bool), ("angle", float)])  # angle in radians


@functools.lru_cache(maxsize=2)
def augmentations(config, epoch: int, count: int) -> np.ndarray:
    """The AUGMENTATION (count,) of samples 0 .. count - 1, drawn as train.py's `config` says.

    Item i is a function of (seed, epoch, i). Horizontal flip with p = 0.5; with p = 0.5 a rotation,
    uniform in +-MAX_ANGLE, otherwise 0. A new transform must draw from
    default_rng([config.seed, epoch, 2]), the next one with a 3: one more column here would change
    the flips and angles of every seed.
    """
    augmentation = np.empty(count, AUGMENTATION)
    # for each sample: whether to flip, whether to rotate, by what angle
    flip, rotate, angle = np.random.default_rng([config.seed, epoch, 1]).random((count, 3)).T
    angle = (2 * angle - 1) * math.radians(MAX_ANGLE)
    augmentation["flip"] = flip < 0.5
    augmentation["angle"] = np.where(rotate < 0.5, angle, 0.0)
    return augmentation


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`, without waiting for the device."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_float(images: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1], contiguous."""
    B, H, W, C = images.shape
    out = torch.empty(B, C, H, W, device=images.device) if out is None else out
    return out.copy_(images.permute(0, 3, 1, 2)).div_(255)


def augment(images: torch.Tensor, augmentation: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) and their AUGMENTATION (B,) -> float (B, 3, S, S) in [0, 1].

    Rotation about the centre, bilinear, the border mirrored about the outermost pixels (OpenCV's
    reflect-101). On a CPU, a few images at a time: they stay in its cache.
    """
    B, H, W, C = images.shape
    x = torch.empty(B, C, H, W, device=images.device)
    size = CPU_GROUP if images.device.type == "cpu" else max(B, 1)
    for first in range(0, B, size):
        group = slice(first, first + size)
        flipped = _flip(images[group], augmentation["flip"][group])
        to_float(flipped, out=x[group])
        _rotate(flipped, augmentation["angle"][group], out=x[group])
    return x


def _flip(images, flip):
    if images.device.type == "cpu":  # torch.where takes ten times as long
        images = images.clone()
        for i in np.flatnonzero(flip):
            images[i] = images[i].flip(1)
        return images
    flip = to_device(torch.tensor(flip), images.device)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images)


def _rotate(images, angle, out):
    """Rotate the images that have an angle, into `out`. channels_last is fastest on two cores.

    Coordinates are computed elementwise, not by a matrix product: a product rounds differently for
    another batch size.
    """
    rotated = np.flatnonzero(angle)
    if not len(rotated):
        return

    # output -> input, in units of half a side: [[cos, -sin], [sin, cos]]
    theta = torch.tensor([(math.cos(a), -math.sin(a), math.sin(a), math.cos(a))
                          for a in angle[rotated]]).T[..., None]         # (4, B, 1)
    theta = to_device(theta, images.device)
    coordinates = torch.linspace(-1, 1, images.shape[1], device=images.device)
    along_x, along_y = theta[[0, 2]] * coordinates, theta[[1, 3]] * coordinates  # (2, B, S)
    grid = along_x[:, :, None] + along_y[..., None]                      # (2, B, S, S)

    # sample there
    rotated = to_device(torch.from_numpy(rotated), images.device)
    source = images[rotated].permute(0, 3, 1, 2).float()                 # channels_last
    out[rotated] = F.grid_sample(source, grid.permute(1, 2, 3, 0), mode="bilinear",
                                 padding_mode="reflection", align_corners=True).div_(255)
