"""Find, label and decode images: a flat folder, class folders, or a zip of either.

The label is the class folder, or the file name where all files are in one folder (`cat.0.jpg`,
`Abyssinian_1.jpg`). Zips are read in place. layouts.py knows what folders and names
mean, sources.py which files are images.
"""
import hashlib
import os
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runtime.errors import InputError, first_line, listed, printable
from .decoding import decode
from .layouts import find_layout, listed_split, name_before_number, naming
from .sources import EXTENSIONS, UNREAD, Folder, Zip, ending, system_part

MAX_BYTES = 64 * 2**20    # a larger file counts as damaged


@dataclass
class ImageSet:
    """Labelled images in a folder or zip, sorted by split and name.

    The lists have one item per image. names: the split depends on them; a folder and a zip of it
    have the same. splits: "train" or "val" where the source has such folders, else "". crcs: the
    CRC-32 of each file, None until it was read; a zip knows them.
    """

    source: Folder | Zip
    layout: str
    classes: list[str]
    files: list[str]
    names: list[str]
    labels: list[int]
    splits: list[str]
    sizes: list[int]      # bytes of each file
    crcs: list[int | None]
    fingerprint: str      # changes with the files, and with the times of a folder's
    notes: list[str] = field(default_factory=list)  # what was left out

    def __len__(self):
        return len(self.files)

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def identity(self) -> str:
        """Of names, splits and sizes: equal for a copy, and for a folder and a zip of it."""
        return digest([self.names, self.splits, self.sizes])

    @property
    def contents(self) -> str:
        """Of the bytes of all files, once they were read."""
        return digest(self.crcs)

    def originals(self) -> list[int]:
        """For each image, the first one with the same bytes: mostly itself."""
        first = {}
        return [index if crc is None or not size else first.setdefault((size, crc), index)
                for index, (size, crc) in enumerate(zip(self.sizes, self.crcs, strict=True))]

    def load(self, index: int, size: int) -> np.ndarray:
        """Image `index` as a uint8 array (size, size, 3). Raises ValueError if it is damaged."""
        if self.sizes[index] > MAX_BYTES:
            raise ValueError(f"{self.sizes[index]:,} bytes are over the limit of {MAX_BYTES:,}")
        try:
            data = self.source.read(self.files[index])
        except Exception as e:  # a damaged zip member, missing permission, a dangling link
            raise ValueError(f"cannot be read: {e}") from e
        self.crcs[index] = zlib.crc32(data)
        return decode(data, size)

    def __str__(self):
        counts = Counter(self.labels)
        per_class = listed(f"{name} {counts[label]:,}" for label, name in enumerate(self.classes))
        line = (f"{len(self):,} images in {printable(base_name(self.path))} ({self.layout}), "
                f"{len(self.classes)} classes: {per_class}")
        if "val" in self.splits:
            line += f"; {self.splits.count('train'):,} train, {self.splits.count('val'):,} val"
        label, most = counts.most_common(1)[0]
        if most / len(self) > 1.2 / len(self.classes):
            answer = printable(self.classes[label])
            line += f"; always answering {answer} would score {most / len(self):.1%}"
        originals = self.originals()
        copies = [index for index, first in enumerate(originals) if index != first]
        if copies:
            alike = len(copies) + len({originals[index] for index in copies})
            line += f"; {alike:,} are byte-identical to another, and stay together"
            other = sum(self.labels[index] != self.labels[originals[index]] for index in copies)
            line += f"; {other:,} of these copies have another class" if other else ""
        val = {first for first, split in zip(originals, self.splits, strict=True) if split == "val"}
        twice = sum(first in val and split == "train"
                    for first, split in zip(originals, self.splits, strict=True))
        if twice:
            line += f"; {twice:,} training images left out, which are validation images, too"
        return "; ".join([line, *self.notes])


class Entry(NamedTuple):
    """An image file that was found."""

    file: str               # its name in the folder or zip
    parts: tuple[str, ...]  # of its path, without outer folders: class folders and base name
    split: str = ""         # train, val, test, or "" where the source does not split


def find_images(path: Path | str) -> ImageSet:
    """The images at `path`, a folder or a zip. Raises InputError where they cannot be used."""
    # every file, and what it may be
    path = existing(path)
    source = Folder(path) if path.is_dir() else Zip(path)
    files, images, others, left_out = sorted_files(source)

    # which split each belongs to
    layout = find_layout(path, images, [parts for parts in others if ending(parts) in UNREAD
                                        or not parts[-1]])
    entries = [Entry("/".join(parts), place[1], place[0])
               for parts in images if (place := layout.place(parts))]
    tests = [entry for entry in entries if entry.split == "test"]
    entries = [entry for entry in entries if entry.split != "test"]

    # which class
    loose = [entry.file for entry in entries if len(entry.parts) == 1]
    if loose and len(loose) < len(entries):
        raise InputError(f"--data: {path} has class folders and {len(loose):,} images beside them "
                         f"({listed(loose, 5)}): move these into a class folder or remove them")
    beside = _without_images(images, others, len(layout.outer)) if loose else ""
    name_of = naming(path, [entry.parts[0] for entry in entries], beside) if loose else None

    def class_of(parts):
        return name_of(parts[0]) if name_of else parts[0] if len(parts) > 1 else None
    _refuse_lost_classes(path, layout, entries, others, class_of)

    # the official split of Oxford-IIIT Pet
    unread = Counter(ending(parts) for parts in others if ending(parts) in UNREAD)
    if name_of is name_before_number:
        unread[".mat"] = sum(ending(parts) == ".mat" for parts in others)
        lists = ["/".join([*layout.outer[:-1], "annotations", name])
                 for name in ("trainval.txt", "test.txt")]
        if all(name in files for name in lists) and not layout.splits:
            entries, unlisted = _with_listed_splits(path, source, lists, entries)
            left_out["in neither list of annotations"] = unlisted

    # the same classes in train and val, at least two
    entries.sort(key=lambda entry: (entry.split, entry.parts))
    class_names = [class_of(entry.parts) for entry in entries]
    classes = sorted(set(class_names))
    train, val = ({name for name, entry in zip(class_names, entries, strict=True)
                   if entry.split == split} for split in ("train", "val"))
    if train != val:
        raise InputError(f"--data: the classes of train and val in {path} differ: "
                         f"{listed(sorted(train ^ val))}")
    if len(classes) < 2:
        raise InputError(f"--data: only one class found in {path}: {classes[0]}, {len(entries):,} "
                         f"images; add another class, or make a folder for each class{beside}")

    # what was left out
    labelled = sum(class_of(entry.parts) in classes for entry in tests)
    notes = [f"{count:,} {kind} test images ignored" for count, kind in (
        (labelled, "labelled"), (len(tests) - labelled, "unlabelled")) if count]
    notes += left_out_notes(unread, left_out)

    stamps = [(entry.file, files[entry.file]) for entry in entries]
    layout = "class in the file name" if loose else "class folders"
    return ImageSet(
        source, f"{layout}, {'folder' if path.is_dir() else 'zip'}", classes,
        files=[entry.file for entry in entries],
        names=["/".join(entry.parts) for entry in entries],
        labels=[classes.index(name) for name in class_names],
        splits=[entry.split for entry in entries],
        sizes=[files[entry.file][0] for entry in entries],
        crcs=[None if path.is_dir() else files[entry.file][1] for entry in entries],
        fingerprint=digest(stamps), notes=notes)


def digest(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def base_name(path: Path) -> str:
    """Also of "." and "..", which are no names."""
    return os.path.basename(os.path.abspath(path)) or str(path)


def existing(path: Path | str) -> Path:
    """The path of a file or folder. Raises InputError if it is neither."""
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"--data: {path} does not exist")
    if not path.is_dir() and not path.is_file():  # opening a named pipe would wait for ever
        raise InputError(f"--data: {path} is neither a folder nor a file")
    return path


def left_out_notes(unread: Counter, left_out: Counter) -> list[str]:
    """A note for each kind of what is not used: {ending: files}, {reason: images}."""
    return [f"{sum(counts.values()):,} {kind}: {_numbers(counts)}" for kind, counts in (
        ("files of other formats ignored", unread), ("images left out", left_out)) if +counts]


def _numbers(counts):
    return listed(f"{printable(name)} {count:,}" for name, count in (+counts).most_common())


def sorted_files(source: Folder | Zip) -> tuple[dict, list, list, Counter]:
    """The files of a source as it lists them; the paths, as tuples of parts, of images and of
    other files and folders; and a Counter of the images that are left out. Raises InputError, which
    says what is there instead, where there is no image."""
    files = source.list_files()
    images, others, left_out = _sort_out(files)
    if not images:
        names = [name for name in files if not name.endswith("/")]
        raise _no_images(source.path, names, others)
    return files, images, others, left_out


def _sort_out(files):
    """The paths of images and of others, and the Counter, of `sorted_files`."""
    images, others, left_out = [], [], Counter()
    folders = {name.rpartition("/")[0] for name in files}
    runs = {folder + "/" for folder in folders
            if folder and {f"{folder}/.lock", f"{folder}/config.json"} <= files.keys()}
    for name in sorted(files):
        parts = tuple(name.split("/"))
        picture = ending(parts) in EXTENSIONS
        if part := system_part(parts):
            if picture or ending(parts) in UNREAD:
                left_out["hidden files" if part == parts[-1] else part] += 1
            # the folder is empty without it, except for that of a run
            others.append(parts if parts[-1] == ".lock" else (*parts[:parts.index(part)], ""))
        elif picture and any(name.startswith(run) for run in runs):
            left_out["figures of runs"] += 1
        elif picture and parts[-3:-1] == ("annotations", "trimaps") and (
                "/".join([*parts[:-3], "images"]) in folders):
            left_out["annotations/trimaps"] += 1
        else:
            (images if picture else others).append(parts)
    return images, others, left_out


def _no_images(path, files, others):
    """The error that says what is there instead."""
    hint = f"it contains {len(files):,} other files"
    if unread := Counter(ending(parts) for parts in others if ending(parts) in UNREAD):
        hint += f", among them pictures of other formats: {_numbers(unread)}"
    if zips := [name for name in files if name.lower().endswith(".zip")]:
        hint = (f"to use a zip in it, give its own path: {path / zips[0]}" if path.is_dir() else
                f"to use the zip in it, unpack it and give the path of {zips[0]}")
    return InputError(f"--data: no images in {path} (looked for {', '.join(EXTENSIONS)}); "
                      f"{printable(hint)}")


def _fault(endings):
    """What is wrong with a folder without images, of whose files these are the endings."""
    unread = Counter({ending: count for ending, count in endings.items() if ending in UNREAD})
    if unread:
        return f"holds only files of other formats: {_numbers(unread)}"
    return None if +endings else "is empty"  # it may hold notes or tables


def _without_images(images, others, depth):
    """Of the folders beside the one that holds everything: what is wrong with each."""
    if not depth:
        return ""
    contents = defaultdict(Counter)
    for parts in others:
        if parts[:depth - 1] == images[0][:depth - 1] and len(parts) > depth:
            contents[parts[depth - 1]][ending(parts)] += bool(parts[-1])
    contents.pop(images[0][depth - 1], None)
    return "".join(f"; the folder {printable(name)} beside it {fault}"
                   for name, endings in contents.items() if (fault := _fault(endings)))


def _refuse_lost_classes(path, layout, entries, others, class_of):
    """Raise InputError where a class has no image, but files that cannot be read, or a folder."""
    found = {(entry.split, class_of(entry.parts)) for entry in entries}
    contents = defaultdict(Counter)
    for parts in others:
        if (place := layout.place(parts)) and place[0] != "test" and (name := class_of(place[1])):
            contents[place[0], name][ending(parts)] += bool(parts[-1])
    faults = [f"{split and split + '/'}{name} {fault}" for (split, name), endings
              in contents.items() if (split, name) not in found and (fault := _fault(endings))]
    if faults:
        raise InputError(f"--data: a class in {path} has no image: {listed(faults)}; "
                         "convert its files, add images, or remove it")


def _with_listed_splits(path, source, lists, entries):
    """The entries of Oxford-IIIT Pet's two lists with their split, and how many are in neither."""
    try:
        splits = listed_split(*map(source.read, lists))
    except Exception as e:
        raise InputError(f"--data: {' or '.join(lists)} in {path} cannot be read: "
                         f"{first_line(e)}") from e
    entries = [entry._replace(split=splits.get(Path(entry.parts[-1]).stem)) for entry in entries]
    kept = [entry for entry in entries if entry.split]
    if not kept:
        raise InputError(f"--data: {' and '.join(lists)} in {path} name none of its images")
    return kept, len(entries) - len(kept)
