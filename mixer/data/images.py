"""Find, label and decode images: a flat Kaggle folder, class folders, or a zip of either.

The label is the class folder, or the start of the file name where all files are in one folder
(`cat.0.jpg`, `dog.0.jpg`). Zips are read in place. Only FORMATS are decoded.
"""
import hashlib
import io
import os
import re
import stat
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..runtime.errors import InputError, first_line, listed, printable

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
MAX_PIXELS = 64_000_000   # a larger picture counts as damaged; 64 MP decode to 192 MB
MAX_BYTES = 64 * 2**20    # a larger file counts as damaged
MAX_NESTED_BYTES = 2 * 2**30  # of a train.zip inside a zip, kept in memory; Kaggle's has 0.57e9
DECODING = 1              # raise this when `decode` changes: cached images are then decoded again
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "test1": "test"}  # folder -> split; Kaggle's test images have no labels


def decode(data: bytes, size: int) -> np.ndarray:
    """bytes of one image file -> uint8 array (size, size, 3): upright RGB, resized to a square.

    Bilinear and antialiased. Applies the EXIF rotation, puts transparency on white, scales 16-bit
    grey to 8 bits, takes the first frame of an animation. Raises ValueError with the fault.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            W, H = image.size
            if W * H > MAX_PIXELS:
                raise ValueError(f"{W}x{H} pixels are over the limit of {MAX_PIXELS:,}")
            image.load()  # all of it: `verify` does not notice a truncated file
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                image = image.point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "RGB":  # converting RGB to RGB would copy it
                image = image.convert("RGB")
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as e:  # on hostile bytes, Pillow raises nearly every exception type
        raise ValueError(str(e) or type(e).__name__) from e


class Folder:
    """The files below a directory."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def list_files(self) -> dict[str, tuple[int, int]]:
        """{name relative to the folder, with forward slashes: (bytes, mtime in ns)}"""
        files, seen = {}, set()

        def refuse(e):
            raise InputError(f"--data: {e.filename} cannot be read: {e.strerror}") from e
        for folder, _, names in os.walk(self.path, followlinks=True, onerror=refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                raise InputError(f"--data: {folder} links to a folder that was already found: "
                                 "its images would count twice")
            seen.add((status.st_dev, status.st_ino))
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.path).as_posix()
                try:
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        files[relative] = (status.st_size, status.st_mtime_ns)
                except OSError:  # a dangling link: `load` reports it
                    files[relative] = (0, 0)
        return files

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """The members of a zip file, or of the train.zip inside it (Kaggle's nesting)."""

    def __init__(self, path: Path | str):
        self.path, self.inner = Path(path), None  # inner: the bytes of the train.zip
        self._open()
        names = self.zip.namelist()
        nested = [name for name in names if name.lower().split("/")[-1] == "train.zip"]
        if nested and not any(map(is_image, names)):
            info = self.zip.getinfo(nested[0])
            if info.file_size > MAX_NESTED_BYTES:
                raise InputError(f"--data: {info.filename} in {path} has {info.file_size:,} bytes, "
                                 "too many to keep in memory: unpack it and give its own path")
            try:
                self.inner = self.zip.read(info)
            except Exception as e:
                raise InputError(f"--data: {info.filename} in {path} is damaged: "
                                 f"{first_line(e)}") from e
            self._open()

    def _open(self):
        try:
            self.zip = zipfile.ZipFile(self.path if self.inner is None else io.BytesIO(self.inner))
        except OSError as e:
            raise InputError(f"--data: {self.path} cannot be read: {e.strerror or e}") from None
        except Exception as e:  # on hostile bytes, zipfile raises nearly every exception type
            raise InputError(f"--data: {self.path} is not a zip file, or is truncated "
                             f"({first_line(e)})") from e
        self.opened_by = os.getpid()
        if any(info.flag_bits & 1 for info in self.zip.infolist()):
            raise InputError(f"--data: {self.path} is encrypted: unpack it with its password and "
                             "give the folder")

    def list_files(self) -> dict[str, tuple[int, int]]:
        """{member name: (bytes, CRC-32)}"""
        return {info.filename: (info.file_size, info.CRC) for info in self.zip.infolist()
                if not info.filename.endswith("/")}

    def read(self, name: str) -> bytes:
        if self.opened_by != os.getpid():  # a forked process must not share its file position
            self._open()
        return self.zip.read(name)


@dataclass
class ImageSet:
    """Labelled images in a folder or zip, sorted by split and name.

    The lists have one item per image. names: the split depends on them; a folder and a zip of it
    have the same. splits: "train" or "val" where the source has such folders, else "".
    """

    source: Folder | Zip
    layout: str
    classes: list[str]
    files: list[str]
    names: list[str]
    labels: list[int]
    splits: list[str]
    sizes: list[int]      # bytes of each file
    fingerprint: str      # changes with the files
    unlabelled: int = 0   # ignored test images

    def __len__(self):
        return len(self.files)

    @property
    def path(self) -> Path:
        return self.source.path

    def load(self, index: int, size: int) -> np.ndarray:
        """Image `index` as a uint8 array (size, size, 3). Raises ValueError if it is damaged."""
        if self.sizes[index] > MAX_BYTES:
            raise ValueError(f"{self.sizes[index]:,} bytes are over the limit of {MAX_BYTES:,}")
        try:
            data = self.source.read(self.files[index])
        except Exception as e:  # a damaged zip member, missing permission, a dangling link
            raise ValueError(f"cannot be read: {e}") from e
        return decode(data, size)

    def __str__(self):
        counts = Counter(self.labels)
        per_class = listed(f"{name} {counts[label]:,}" for label, name in enumerate(self.classes))
        line = (f"{len(self):,} images in {printable(self.path.name)} ({self.layout}), "
                f"{len(self.classes)} classes: {per_class}")
        if "val" in self.splits:
            line += f"; {self.splits.count('train'):,} train, {self.splits.count('val'):,} val"
        label, most = counts.most_common(1)[0]
        if most / len(self) > 1.2 / len(self.classes):
            answer = printable(self.classes[label])
            line += f"; always answering {answer} would score {most / len(self):.1%}"
        if self.unlabelled:
            line += f"; {self.unlabelled:,} unlabelled test images ignored"
        return line


class Entry(NamedTuple):
    """An image file that was found."""

    file: str               # its name in the folder or zip
    parts: tuple[str, ...]  # of its path, without outer folders: class folders and base name
    split: str = ""         # train, val, test, or "" where the source does not split


def find_images(path: Path | str) -> ImageSet:
    """The images at `path`, a folder or a zip. Raises InputError where they cannot be used."""
    # every image file
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"--data: {path} does not exist")
    if not path.is_dir() and not path.is_file():  # opening a named pipe would wait for ever
        raise InputError(f"--data: {path} is neither a folder nor a file")
    source = Folder(path) if path.is_dir() else Zip(path)
    files = source.list_files()
    entries = [Entry(file, tuple(file.split("/"))) for file in sorted(files) if is_image(file)]
    if not entries:
        zips = [name for name in files if name.lower().endswith(".zip")]
        hint = (f"to use a zip in it, give its own path: {path / zips[0]}" if zips else
                f"it contains {len(files):,} other files")
        raise InputError(f"--data: no images in {path} (looked for {', '.join(EXTENSIONS)}); "
                         f"{hint}")

    # which split each belongs to
    entries = _with_splits(path, entries)
    unlabelled = sum(entry.split == "test" for entry in entries)
    entries = [entry for entry in entries if entry.split != "test"]

    # which class
    loose = [entry.file for entry in entries if len(entry.parts) == 1]
    if loose and len(loose) < len(entries):
        raise InputError(f"--data: {path} has class folders and {len(loose):,} images beside them "
                         f"({listed(loose, 5)}): move these into a class folder or remove them")
    entries.sort(key=lambda entry: (entry.split, entry.parts))
    class_names = (_classes_by_name if loose else _classes_by_folder)(path, entries)
    classes = sorted(set(class_names))
    if len(classes) < 2:
        raise InputError(f"--data: only one class found in {path}: {classes[0]}, {len(entries):,} "
                         "images; add another class, or make a folder for each class")

    stamps = [(entry.file, files[entry.file]) for entry in entries]
    layout = "class in the file name" if loose else "class folders"
    return ImageSet(
        source, f"{layout}, {'folder' if path.is_dir() else 'zip'}", classes,
        files=[entry.file for entry in entries],
        names=["/".join(entry.parts) for entry in entries],
        labels=[classes.index(name) for name in class_names],
        splits=[entry.split for entry in entries],
        sizes=[files[entry.file][0] for entry in entries],
        fingerprint=hashlib.sha256(repr(stamps).encode()).hexdigest(), unlabelled=unlabelled)


def is_image(name: str) -> bool:
    """Whether a file has an image's extension, and neither it nor a folder of it is hidden."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(EXTENSIONS)


def _with_splits(path, entries):
    """The entries without outer folders that contain everything, and with the split of each.

    Where there is a train folder, train/ or val/ is the split and is removed, too.
    """
    while (entries[0].parts[0].lower() != "train" and all(
            len(entry.parts) > 1 and entry.parts[0] == entries[0].parts[0] for entry in entries)):
        entries = [entry._replace(parts=entry.parts[1:]) for entry in entries]
    folders = {entry.parts[0].lower() for entry in entries}
    if "train" not in folders:
        return entries
    others = {entry.parts[0] + ("/" if len(entry.parts) > 1 else "") for entry in entries
              if entry.parts[0].lower() not in SPLITS}
    if others:
        raise InputError(f"--data: {path} has a train folder and also {listed(sorted(others), 5)}; "
                         f"beside train, only {', '.join([*SPLITS][1:])} are allowed")
    has_val = "val" in {SPLITS[folder] for folder in folders}
    splits = SPLITS if has_val else {**SPLITS, "train": ""}  # `split` will choose some of train/
    below = []
    for file, (folder, *parts), _ in entries:
        if len(parts) > 1 and parts[0] == folder:  # Kaggle's zip unpacks to train/train/
            parts = parts[1:]
        below.append(Entry(file, tuple(parts), splits[folder.lower()]))
    return below


def _classes_by_folder(path, entries):
    """The class of each entry: the first folder of its path."""
    train, val = ({entry.parts[0] for entry in entries if entry.split == split}
                  for split in ("train", "val"))
    if train != val:
        raise InputError(f"--data: the class folders of train and val in {path} differ: "
                         f"{listed(sorted(train ^ val))}")
    return [entry.parts[0] for entry in entries]


def _classes_by_name(path, entries):
    """The class of each entry: its file name up to the first dot, cat or dog in any case."""
    matches = [re.match(r"(cat|dog)\.", entry.parts[0], re.IGNORECASE) for entry in entries]
    unknown = [entry.file for entry, match in zip(entries, matches, strict=True) if not match]
    count = f"{len(entries):,} images"
    if len(unknown) == len(entries):
        raise InputError(f"--data: only one class found in {path}: all {count} are in one folder "
                         f"and none is named cat.* or dog.* ({listed(unknown, 3)}); "
                         "rename them, or make a folder for each class")
    if unknown:
        raise InputError(f"--data: {len(unknown):,} of {count} in {path} are named neither cat.* "
                         f"nor dog.*: {listed(unknown)}; rename them or move them away")
    return [match[1].lower() for match in matches]
