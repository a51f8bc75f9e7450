"""Find images: labelled, in a folder or a zip; or of unknown labels, in any number of these."""
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.errors import InputError, listed, printable
from .decoding import decode
from .layouts import label_pictures, left_out_note, sort_files
from .sources import base_name, open_source

MAX_BYTES = 64 * 2**20  # a larger file counts as damaged
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")  # in which labels may be
ADVICE = ("give a folder with one subfolder per class, or with train, val and test folders of such "
          "subfolders, or name all images like cat.0.jpg or like Maine_Coon_1.jpg")


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
    stamps: list[tuple[int, int]]  # (bytes, time or checksum) of each file
    read_file: Callable[[str], bytes]
    decode: Callable[[bytes, int], np.ndarray] = decode
    note: str = ""        # what was left out

    def __len__(self):
        return len(self.files)

    @property
    def key(self) -> str:
        """A digest of names, splits and sizes: equal for a copy, and for a folder and its zip."""
        return digest([self.names, self.splits, [size for size, _ in self.stamps]])

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises ValueError if it cannot be read."""
        if (size := self.stamps[index][0]) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are over the limit of {MAX_BYTES:,}")
        try:
            return self.read_file(self.files[index])
        except Exception as e:  # a damaged zip member, missing permission, a dangling link
            raise ValueError(f"cannot be read: {e}") from e


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
    # files, and from their names the classes
    files, read = open_source(path)
    pictures, left_out = sort_files(path, files)
    try:
        layout, images = label_pictures(pictures, files, read, left_out)
    except InputError as e:
        tables = sorted(os.path.basename(name) for name in files if name.lower().endswith(TABLES))
        hint = f"; labels in {listed(tables, 3)} are not read" if tables else ""
        raise InputError(f"--data: the classes in {path} are ambiguous: {e}; {ADVICE}{hint}") from e

    # as one set, with classes in alphabetical order
    kind = "folder" if os.path.isdir(path) else "zip"
    classes = sorted({image.label for image in images})
    return ImageSet(
        Path(path), f"images in {printable(base_name(path))} ({layout}, {kind})", classes,
        files=[image.name for image in images], names=["/".join(image.parts) for image in images],
        labels=[classes.index(image.label) for image in images],
        splits=[image.split for image in images], stamps=[files[image.name] for image in images],
        read_file=read, note=left_out_note(left_out))


def find_unlabelled(paths: Iterable[str]) -> ImageSet:
    """All images of these files, folders and zips, once each, in this order. A test1.zip inside a
    zip is read in place. `classes` is empty, labels are 0. Raises InputError if there is no image.
    """
    found, left_out = {}, Counter()  # {name: (stamp, how to read it)}
    for path in map(Path, dict.fromkeys(paths)):
        if path.is_file() and path.suffix.lower() != ".zip":  # a picture, whatever its ending
            stamp = path.stat().st_size, path.stat().st_mtime_ns
            found[str(path)] = stamp, path.read_bytes
            continue
        files, read = open_source(path, nested=("test1.zip", "test.zip"))
        pictures, unused = sort_files(path, files)
        left_out += unused
        found |= {f"{path}/{picture.name}": (files[picture.name],
                                             functools.partial(read, picture.name))
                  for picture in pictures if picture.readable}
    # a constant path: each call replaces what the one before left in the cache
    names, stamps = list(found), [stamp for stamp, _ in found.values()]
    return ImageSet(Path(os.sep, "predictions"), "images", [], names, names, [0] * len(names),
                    [""] * len(names), stamps, read_file=lambda name: found[name][1](),
                    note=left_out_note(left_out))


def digest(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
