"""The images of files, folders and zips whose labels are unknown."""
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .images import ImageSet, digest, existing, left_out_notes, sorted_files
from .sources import EXTENSIONS, UNREAD, Folder, Zip, ending

NESTED = ("test1.zip", "test.zip")  # in Kaggle's zips of everything


class Sources:
    """Files of several folders and zips. `path` gives them one place in the cache of decoded
    images: what was predicted before is replaced."""

    path = Path(os.sep, "predictions")

    def __init__(self):
        self.places = {}  # {name: (source, name in it)}

    def read(self, name: str) -> bytes:
        source, inner = self.places[name]
        return source.read(inner)


def find_unlabelled(paths: Iterable[str]) -> ImageSet:
    """All images of these files, folders and zips, once each, in this order. A test1.zip inside a
    zip is read in place. Classes are none and labels 0. Raises InputError where there is no image.
    """
    sources, stamps, unread, left_out = Sources(), {}, Counter(), Counter()
    for path in map(existing, dict.fromkeys(paths)):
        for name, place, stamp in _images_at(path, unread, left_out):
            sources.places[name], stamps[name] = place, stamp
    files = list(sources.places)
    return ImageSet(sources, "no labels", classes=[], files=files, names=files,
                    labels=[0] * len(files), splits=[""] * len(files),
                    sizes=[stamps[name][0] for name in files], crcs=[None] * len(files),
                    fingerprint=digest([*stamps.items()]),
                    notes=left_out_notes(unread, left_out))


def _images_at(path, unread, left_out):
    """Yield (name, (source, name in it), (bytes, time or CRC)) of the images at a path."""
    if path.is_file() and ending(path.parts) in EXTENSIONS or not (
            path.is_dir() or path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)):
        status = path.stat()
        yield str(path), (Folder(path.parent), path.name), (status.st_size, status.st_mtime_ns)
        return
    source = Folder(path) if path.is_dir() else Zip(path, NESTED)
    files, images, others, left_out_here = sorted_files(source)
    unread.update(ending(parts) for parts in others if ending(parts) in UNREAD)
    left_out.update(left_out_here)
    for parts in images:
        name = "/".join(parts)
        yield f"{path}/{name}", (source, name), files[name]
