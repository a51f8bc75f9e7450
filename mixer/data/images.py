"""Find, label and decode images: a flat Kaggle folder, class folders, or a zip of either, unopened.

The label comes from the class folder or, where all files lie in one folder, from the base name (`cat.0.jpg`, `dog.0.jpg`).
Nothing is ever extracted from a zip, and only FORMATS are decoded.
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

import numpy as np
from PIL import Image, ImageOps

from ..runtime.errors import InputError, listed, printable

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
MAX_PIXELS = 64_000_000   # a larger picture counts as damaged; 64 MP decode to 192 MB
MAX_BYTES = 64 * 2**20    # and so does a larger file
MAX_NESTED_BYTES = 2 * 2**30  # of a train.zip inside a zip, which is held in memory; Kaggle's has 0.57e9
DECODING = 1              # raise when `decode` changes what it returns: packed images are then made anew
VAL_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "test1")  # unlabelled in Kaggle's copy, so left alone


def decode(data, size):
    """bytes of one image file -> uint8 array (size, size, 3), upright RGB, squeezed to a square (bilinear, antialiased).

    EXIF rotation is applied, transparency laid over white, 16-bit grey scaled to 8, the first frame of an animation
    taken, grey, CMYK and palette converted. Raises ValueError saying what is wrong with the file.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
            image.load()  # the whole of it: `verify` does not notice a file that is cut
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
    except Exception as e:  # Pillow's decoders raise nearly every type there is on hostile bytes
        raise ValueError(str(e) or type(e).__name__) from e


class Folder:
    """The files below a directory."""

    kind = "folder"

    def __init__(self, path):
        self.path = Path(path)

    def entries(self):
        """{name relative to the folder: (bytes, modification time in ns)}; names with forward slashes."""
        found, seen = {}, set()

        def unreadable(e):
            raise InputError(f"--data: {e.filename} cannot be read: {e.strerror}") from e
        for folder, _, files in os.walk(self.path, followlinks=True, onerror=unreadable):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                raise InputError(f"--data: {folder} is a link to a folder that is there already: its images would count twice")
            seen.add((status.st_dev, status.st_ino))
            for file in files:
                full = Path(folder, file)
                try:
                    status = full.stat()
                except OSError:  # a dangling link: reported when it is read
                    found[full.relative_to(self.path).as_posix()] = (0, 0)
                    continue
                if stat.S_ISREG(status.st_mode):
                    found[full.relative_to(self.path).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found

    def read(self, name):
        return (self.path / name).read_bytes()


class Zip:
    """The members of a zip file, or of the train.zip inside it (Kaggle's own nesting), read in memory."""

    kind = "zip"

    def __init__(self, path):
        self.path = Path(path)
        self.inner = None        # the bytes of the zip inside the zip
        self.opened_by = None    # a forked process must not share its parent's file position
        self._open()
        if not any(is_image(name) for name in self.zip.namelist()):
            nested = [name for name in self.zip.namelist() if Path(name).name.lower() == "train.zip"]
            if nested:
                self._read_inner(self.zip.getinfo(nested[0]))
                self._open()

    def _open(self):
        try:
            self.zip = zipfile.ZipFile(self.path if self.inner is None else io.BytesIO(self.inner))
        except OSError as e:
            raise InputError(f"--data: {self.path} cannot be read: {e.strerror or e}") from None
        except Exception as e:  # of hostile bytes zipfile makes nearly every type there is
            raise InputError(f"--data: {self.path} is not a zip file, or is cut short ({e or type(e).__name__})") from e
        self.opened_by = os.getpid()

    def _read_inner(self, info):
        self._check(info)
        if info.file_size > MAX_NESTED_BYTES:
            raise InputError(f"--data: {info.filename} in {self.path} has {info.file_size:,} bytes; unpack it, and give its own path")
        try:
            self.inner = self.zip.read(info)
        except Exception as e:
            raise InputError(f"--data: {info.filename} in {self.path} is damaged: {e or type(e).__name__}") from e

    def _check(self, info):
        if info.flag_bits & 1:
            raise InputError(f"--data: {self.path} is encrypted; unpack it with its password and give the folder")

    def entries(self):
        """{member name: (bytes, CRC-32)}"""
        for info in self.zip.infolist():
            self._check(info)
        return {info.filename: (info.file_size, info.CRC) for info in self.zip.infolist() if not info.filename.endswith("/")}

    def read(self, name):
        if self.opened_by != os.getpid():
            self._open()
        return self.zip.read(name)


@dataclass
class ImageSet:
    """Labelled images in a folder or zip, sorted by name.

    names: what the split depends on, the same for a folder and for a zip of it; splits: "train" or "val" where the
    source says so, else "".
    """

    source: Folder | Zip
    layout: str
    classes: list
    files: list
    names: list
    labels: list
    splits: list
    sizes: list
    fingerprint: str
    ignored: str = ""

    def __len__(self):
        return len(self.files)

    @property
    def path(self):
        return self.source.path

    def load(self, index, size):
        """Image `index` as a uint8 array (size, size, 3). Raises ValueError when it does not decode."""
        if self.sizes[index] > MAX_BYTES:
            raise ValueError(f"{self.sizes[index]:,} bytes are over the limit of {MAX_BYTES:,}")
        try:
            data = self.source.read(self.files[index])
        except Exception as e:  # a damaged zip member, a file without permission, a dangling link
            raise ValueError(f"cannot be read: {e}") from e
        return decode(data, size)

    def __str__(self):
        """The one line that says what was found."""
        counts = Counter(self.labels)
        per_class = listed(f"{name} {counts[label]:,}" for label, name in enumerate(self.classes))
        split = Counter(part for part in self.splits if part)
        line = f"{len(self):,} images in {printable(self.path.name)} ({self.layout}), {len(self.classes)} classes: {per_class}"
        if split["val"]:
            line += f"; {split['train']:,} train, {split['val']:,} val"
        most = max(counts.values()) / len(self)
        if most > 1.2 / len(self.classes):
            line += f"; always answering {printable(self.classes[counts.most_common(1)[0][0]])} would score {most:.1%}"
        return line + self.ignored


def is_image(name):
    """By its extension, and not a file of the operating system's own."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(EXTENSIONS)


def find_images(path):
    """The ImageSet at `path`, a folder or a zip file. Raises InputError saying what was found instead."""
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"--data: there is no {path}")
    if not path.is_dir() and not path.is_file():  # opening a named pipe would wait for ever
        raise InputError(f"--data: {path} is neither a folder nor a file")
    source = Folder(path) if path.is_dir() else Zip(path)
    entries = source.entries()
    files = sorted(name for name in entries if is_image(name))
    if not files:
        zips = [name for name in entries if name.lower().endswith(".zip")]
        hint = f"; to use a zip in it, give its own path: {path / zips[0]}" if zips else f"; it holds {len(entries):,} other files"
        raise InputError(f"--data: no images in {path} (looked for {', '.join(EXTENSIONS)}){hint}")

    paths, parts, ignored = _split_folders(path, [tuple(file.split("/")) for file in files])
    kept = [(file, rest, part) for file, rest, part in zip(files, paths, parts) if part != "test"]
    depths = {len(rest) > 1 for _, rest, _ in kept}
    if depths == {True, False}:
        loose = [file for file, rest, _ in kept if len(rest) == 1]
        raise InputError(f"--data: {path} has class folders and {len(loose):,} images beside them ({listed(loose, 5)}); "
                         "move these into a class folder or away")
    kept.sort(key=lambda item: (item[2], item[1]))
    layout, classes, labels = (_by_folder if depths == {True} else _by_name)(path, kept)
    digest = hashlib.sha256(repr([(file, entries[file]) for file, _, _ in kept]).encode()).hexdigest()
    return ImageSet(source, f"{layout}, {source.kind}", classes, [file for file, _, _ in kept],
                    ["/".join(rest) for _, rest, _ in kept], labels, [part for _, _, part in kept],
                    [entries[file][0] for file, _, _ in kept], digest, ignored)


def _split_folders(path, paths):
    """Take common folders off, then train/ and val/: the paths below them, and the part of each."""
    while len({p[0] for p in paths}) == 1 and all(len(p) > 1 for p in paths) and paths[0][0].lower() != "train":
        paths = [p[1:] for p in paths]
    heads = {p[0].lower() for p in paths if len(p) > 1}
    if "train" not in heads:
        return paths, [""] * len(paths), ""
    part_of = {"train": "train", **dict.fromkeys(VAL_FOLDERS, "val"), **dict.fromkeys(TEST_FOLDERS, "test")}
    strange = sorted({"/".join(p) if len(p) == 1 else p[0] + "/" for p in paths if len(p) == 1 or p[0].lower() not in part_of})
    if strange:
        raise InputError(f"--data: {path} has a train folder and, beside it, {listed(strange, 5)}; "
                         f"beside train only {', '.join(VAL_FOLDERS + TEST_FOLDERS)} are understood")
    parts = [part_of[p[0].lower()] for p in paths]
    if "val" not in parts:
        parts = ["" if part == "train" else part for part in parts]
    paths = [p[2:] if len(p) > 2 and p[0] == p[1] else p[1:] for p in paths]  # Kaggle's zip unpacks to train/train/
    tests = parts.count("test")
    return paths, parts, f"; {tests:,} unlabelled test images left alone" if tests else ""


def _by_folder(path, kept):
    """Class = first folder of the path."""
    classes = sorted({rest[0] for _, rest, _ in kept})
    per_part = {part: {rest[0] for _, rest, p in kept if p == part} for part in ("train", "val")}
    if any(per_part.values()) and per_part["train"] != per_part["val"]:
        odd = sorted(per_part["train"] ^ per_part["val"])
        raise InputError(f"--data: the class folders of train and val in {path} differ: {listed(odd)}")
    if len(classes) < 2:
        raise InputError(f"--data: only one class found in {path}: {classes[0]}; there must be a folder for each class")
    return "class folders", classes, [classes.index(rest[0]) for _, rest, _ in kept]


def _by_name(path, kept):
    """Class = cat or dog, what stands in front of the first dot, case ignored."""
    classes = ["cat", "dog"]
    matches = [re.match(r"(cat|dog)\.", rest[-1], re.IGNORECASE) for _, rest, _ in kept]
    unknown = [file for (file, _, _), match in zip(kept, matches) if not match]
    if len(unknown) == len(kept):
        raise InputError(f"--data: only one class found in {path}: all {len(kept):,} images lie in one folder and none is "
                         f"called cat.* or dog.* ({listed(unknown, 3)}); name them so, or make a folder for each class")
    if unknown:
        raise InputError(f"--data: {len(unknown):,} of {len(kept):,} images in {path} are called neither cat.* nor dog.*: "
                         f"{listed(unknown)}; rename them or move them away")
    labels = [classes.index(match[1].lower()) for match in matches]
    if len(set(labels)) < 2:
        raise InputError(f"--data: only one class found in {path}: all {len(kept):,} images are called {classes[labels[0]]}.*")
    return "class in the file name", classes, labels
