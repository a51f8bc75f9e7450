"""From found images to training and validation: those that decode, divided by a keyed hash."""
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from ..runtime.distributed import World
from ..runtime.errors import InputError, listed, printable
from ..runtime.files import write_csv
from .batches import Subset
from .cache import decode_to_cache
from .images import ImageSet, describe, digest


def load_data(config, images: ImageSet, out: Path, device: torch.device,
              world: World) -> tuple[Subset, Subset, dict, str]:
    """The training and the validation images, decoded; the contents of split.json; a digest of the
    files' bytes. config: train.py's. Raises InputError where they cannot be used.
    """
    # the images that decode, divided
    print(describe(images), flush=True)
    array, faults, digests = decode_to_cache(images, config.image_size, config.cache)
    path = out / "bad_images.csv"
    if world.rank == 0:
        path.unlink(missing_ok=True)
    indices = drop_damaged(images, faults, config.bad_images, path, world.rank)
    train, val = split(images, indices, digests, config.val_fraction, config.seed)
    print(f"{len(train):,} training and {len(val):,} validation images", flush=True)
    if not world.size <= config.batch_size <= len(train):
        raise InputError(f"--batch-size {config.batch_size}: must be at least {world.size} (ranks) "
                         f"and at most {len(train):,} (training images)")

    # the same images on all machines
    splits = {"seed": config.seed, "val_fraction": config.val_fraction, "classes": images.classes,
              "train": [images.names[i] for i in train], "val": [images.names[i] for i in val]}
    contents = digest(digests)
    if world.broadcast(key := digest([splits, contents])) != key:
        raise InputError(f"--data: the images in {images.path} on rank {world.rank} differ from "
                         "those on rank 0")
    tensors = to_tensors(array, images.labels, device)
    return Subset(*tensors, train), Subset(*tensors, val), splits, contents


def drop_damaged(images: ImageSet, faults: dict[int, str], policy: str,
                 path: Path | str, rank: int = 0) -> np.ndarray:
    """Indices of the images that decode, int64. Rank 0 writes the others to the csv file `path`.

    policy "report": raises InputError if any image is damaged; "skip": prints which are skipped.
    """
    if not faults:
        return np.arange(len(images))
    if rank == 0:
        write_csv(path, [{"image": images.files[index], "fault": fault}
                         for index, fault in faults.items()])
    # stop, or go on without them
    count = f"{len(faults):,} of {len(images):,} images"
    details = listed((f"{images.files[index]} ({fault})" for index, fault in faults.items()), 8)
    if policy == "report":
        raise InputError(f"--data: {count} do not decode: {details}. All are listed in {path}; "
                         "repair or remove them, or skip them with --bad-images skip")
    print(f"skipped {count} that do not decode: {details}; all are listed in {path}", flush=True)
    return np.setdiff1d(np.arange(len(images)), list(faults))


def split(images: ImageSet, indices: np.ndarray, digests: list[str | None], val_fraction: float,
          seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the images `indices` into training and validation: two sorted int64 arrays.

    If the data set comes with train and val folders, they are used. Otherwise a hash of (seed,
    name) picks round(val_fraction * n), at least one, of the n images of each class. So the split
    depends on names and seed only, and adding images moves few of the others. Images with equal
    `digests` are never on both sides: the hash picks them as one group, and copies of images in a
    val folder are left out of training. Raises InputError for a class without training images.
    """
    # groups of equal images, in the order of their first names
    groups = defaultdict(list)
    for index in indices:
        groups[digests[index]].append(index)
    if copies := sum(len(group) for group in groups.values() if len(group) > 1):
        print(f"{copies:,} images are byte-identical to another, and stay on one side", flush=True)

    # validation, and training without its copies
    if "val" in images.splits:
        val = [index for index in indices if images.splits[index] == "val"]
    else:
        val = _held_out(images, list(groups.values()), val_fraction, seed) if val_fraction else []
    in_val = {digests[index] for index in val}
    train = [index for index in indices if digests[index] not in in_val]
    if left_out := len(indices) - len(train) - len(val):
        print(f"left out {left_out:,} training images that are also validation images")
    if lost := set(images.labels) - {images.labels[index] for index in train}:
        raise InputError("--data: no training image is left of class "
                         f"{listed(images.classes[label] for label in sorted(lost))}")
    return np.array(train, dtype=np.int64), np.array(sorted(val), dtype=np.int64)


def _held_out(images, groups, val_fraction, seed):
    """Some of the groups of equal images of each class, by a hash: a list of indices."""
    def key(group):
        text = f"{seed}/{images.names[group[0]]}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    # the groups of each class; what is equal to an image of another class stays in training
    val, totals, by_class = [], Counter(), defaultdict(list)
    for group in groups:
        labels = [images.labels[index] for index in group]
        totals.update(labels)
        if len(set(labels)) == 1:
            by_class[labels[0]].append(group)

    # the first by their hashes
    for label, name in enumerate(images.classes):
        total = totals[label]
        count, chosen = min(max(1, round(val_fraction * total)), total - 1), []
        for group in sorted(by_class[label], key=key):
            if len(chosen) + len(group) <= count:
                chosen += group
        if not chosen:
            print(f"class {printable(name)} has too few distinct images for validation")
        val += chosen
    return val


def to_tensors(array: np.ndarray, labels: list[int],
               device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, on a GPU if the images take less than half of its free memory."""
    fit = device.type == "cuda" and array.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    place = device if fit else "cpu"
    return torch.from_numpy(array).to(place), torch.tensor(labels).to(place)
