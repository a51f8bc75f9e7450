"""Find images: labelled, in a folder or a zip; or of unknown labels, in any number of these.

sources.py knows which files are images, layouts.py what folders and names mean.
"""
import functools
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.errors import InputError, listed, printable
from .decoding import decode
from .layouts import IN_NAMES, checked_classes, find_labels, listed_splits
from .sources import EXTENSIONS, ending, left_out_note, open_source, sort_files

MAX_BYTES = 64 * 2**20  # a larger file counts as damaged
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")  # in which labels may be


@dataclass
class ImageSet:
    """Images, sorted by split and name. The lists have one item per image."""

    path: Path
    origin: str           # "images in pets.zip (class folders, zip)"
    classes: list[str]
    files: list[str]
    names: list[str]      # the split depends on them; a folder and a zip of it have the same
    labels: list[int]
    splits: list[str]     # "train" or "val" where the source has such folders, else ""
    sizes: list[int]      # bytes of each file
    cache_key: str        # changes with the files, and with the times of a folder's
    read_file: Callable[[str], bytes]
    decode: Callable[[bytes, int], np.ndarray] = decode
    note: str = ""        # what was left out

    def __len__(self):
        return len(self.files)

    @property
    def run_key(self) -> str:
        """Of names, splits and sizes: equal for a copy, and for a folder and a zip of it."""
        return digest([self.names, self.splits, self.sizes])

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises ValueError if it cannot be read."""
        if self.sizes[index] > MAX_BYTES:
            raise ValueError(f"{self.sizes[index]:,} bytes are over the limit of {MAX_BYTES:,}")
        try:
            return self.read_file(self.files[index])
        except Exception as e:  # a damaged zip member, missing permission, a dangling link
            raise ValueError(f"cannot be read: {e}") from e

    def load(self, index: int, size: int) -> np.ndarray:
        """Image `index` as a uint8 array (size, size, 3). Raises ValueError if it is damaged."""
        return self.decode(self.read(index), size)


def describe(images: ImageSet) -> str:
    """A line that says what was found, and what was left out."""
    counts = Counter(images.labels)
    per_class = listed(f"{name} {counts[label]:,}" for label, name in enumerate(images.classes))
    line = f"{len(images):,} {images.origin}, {len(images.classes)} classes: {per_class}"
    if "val" in images.splits:
        line += f"; {images.splits.count('train'):,} train, {images.splits.count('val'):,} val"
    return "; ".join(filter(None, [line, images.note]))


def find_images(path: Path | str) -> ImageSet:
    """The images at `path`, a folder or a zip. Raises InputError where they cannot be used."""
    path = existing(path)
    files, read = open_source(path)
    images, lost, left_out = sort_files(path, files)

    # which split and class each belongs to
    tables = sorted(os.path.basename(name) for name in files if ending(name) in TABLES)
    hint = f"; labels may be in {listed(tables, 3)}, which train.py does not read" if tables else ""
    layout, outer, found = find_labels(path, images + lost, hint)
    left_out["test images"] = sum(found[parts][0] == "test" for parts in images)
    images = [parts for parts in images if found[parts][0] != "test"]
    filled = {(found[parts][0], found[parts][2]) for parts in images} | {("test", "")}
    if empty := [parts for parts in lost if (found[parts][0], found[parts][2]) not in filled]:
        raise InputError(f"--data: a class in {path} has no image that can be read, only "
                         f"{listed(map('/'.join, empty), 3)}: add images, convert its files, or "
                         "remove it")

    # the official split of Oxford-IIIT Pet
    if layout == IN_NAMES and (splits := listed_splits(files, read, outer)):
        found = {parts: (splits.get(Path(parts[-1]).stem), *found[parts][1:]) for parts in images}
        left_out["in neither list of annotations"] = sum(not found[parts][0] for parts in images)
        images = [parts for parts in images if found[parts][0]]
        if not images:
            raise InputError(f"--data: the lists in annotations name no image of {path}")

    # in order
    images.sort(key=found.get)
    splits, rests, labels = (list(column) for column in zip(*map(found.get, images), strict=True))
    classes = checked_classes(path, splits, labels)
    names = ["/".join(parts) for parts in images]
    kind = "folder" if path.is_dir() else "zip"
    return ImageSet(
        path, f"images in {printable(base_name(path))} ({layout}, {kind})", classes, names,
        names=["/".join(rest) for rest in rests], labels=[classes.index(name) for name in labels],
        splits=splits, sizes=[files[name][0] for name in names],
        cache_key=digest([(name, files[name]) for name in names]), read_file=read,
        note=left_out_note(left_out))


def find_unlabelled(paths: Iterable[str]) -> ImageSet:
    """All images of these files, folders and zips, once each, in this order. A test1.zip inside a
    zip is read in place. Classes are none and labels 0. Raises InputError where there is no image.
    """
    readers, stamps, left_out = {}, {}, Counter()
    for path in map(existing, dict.fromkeys(paths)):
        picture = path.is_file() and ending(path.name) in EXTENSIONS
        if picture or not (path.is_dir() or ending(path.name) == ".zip"
                           or zipfile.is_zipfile(path)):
            stamps[str(path)] = path.stat().st_size, path.stat().st_mtime_ns
            readers[str(path)] = path.read_bytes
            continue
        files, read = open_source(path, nested=("test1.zip", "test.zip"))
        images, _, counts = sort_files(path, files)
        left_out += counts
        for name in map("/".join, images):
            stamps[f"{path}/{name}"] = files[name]
            readers[f"{path}/{name}"] = functools.partial(read, name)
    # one path, so one place in the cache of decoded images: what was predicted before is replaced
    names, count = list(readers), len(readers)
    return ImageSet(Path(os.sep, "predictions"), "images", [], names, names, [0] * count,
                    [""] * count, sizes=[stamps[name][0] for name in names],
                    cache_key=digest([*stamps.items()]), read_file=lambda name: readers[name](),
                    note=left_out_note(left_out))


def digest(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def base_name(path: Path) -> str:
    """The last component of a path, also for "." and ".."."""
    return os.path.basename(os.path.abspath(path)) or str(path)


def existing(path: Path | str) -> Path:
    """The path of a file or folder. Raises InputError if it is neither."""
    if not path or not os.path.exists(path):
        raise InputError(f"--data: {path or 'an empty path'} does not exist")
    if not os.path.isdir(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise InputError(f"--data: {path} is neither a folder nor a file")
    return Path(path)
