"""Decode every image once, into one file on disk."""
import contextlib
import hashlib
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..runtime.device import cores
from ..runtime.files import locked, save_atomically, writable_folder
from .decoding import DECODING
from .images import ImageSet, digest


def decode_to_cache(images: ImageSet, size: int, cache: Path | str | None = None
                    ) -> tuple[np.ndarray, dict[int, str], list[str | None]]:
    """Decode `images` to size x size pixels.

    Returns a uint8 array (N, size, size, 3), {index: fault} of the damaged images, which are zero
    in the array, and a digest of each file's bytes, None where it cannot be read. The array is
    memory-mapped from a file in the folder `cache`, or the user's cache folder; it is rebuilt when
    the source, the size or DECODING changes. A second process waits until the first has made it.
    Raises InputError or OSError if the file cannot be written.
    """
    # a file per source and size, and what it must have been made from
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = writable_folder(cache or Path(home, "vit-convmixer"), "--cache")
    path_hash = hashlib.sha256(os.fsencode(images.path.absolute())).hexdigest()[:10]
    name = f"{images.path.stem[:40]}-{path_hash}-{size}px"
    path, shape = cache / f"{name}.uint8", (len(images), size, size, 3)
    key = [digest(list(zip(images.files, images.stamps, strict=True))), DECODING]
    # read it, or decode first; one process at a time
    busy = "another process is decoding these images: waiting for it"
    with locked(cache / f"{name}.lock", lambda: print(busy, flush=True)):
        found = _read_cache(path, shape, key)
        if not found or _readable_now(images, *found[1:]):
            save_atomically(path, lambda temporary: _decode_all(images, shape, key, temporary))
            found = _read_cache(path, shape, key)
    return found


def _read_cache(path, shape, key):
    """What `decode_to_cache` returns; None if the file is missing, damaged or has another key."""
    try:
        with open(path, "rb") as file:
            file.seek(math.prod(shape))
            found, faults, digests = json.loads(file.read())
        array = np.memmap(path, np.uint8, "c", shape=shape)  # copy-on-write: the file stays
        faults = {int(index): fault for index, fault in faults.items()}
    except Exception:  # on damaged bytes, json and numpy raise nearly every exception type
        return None
    return (array, faults, digests) if found == key else None


def _readable_now(images, faults, digests):
    """Whether an image can be read that could not be read when the cache was made."""
    for index in faults:
        with contextlib.suppress(ValueError):
            if digests[index] is None:
                images.read(index)
                return True
    return False


def _decode_all(images, shape, key, path):
    """Write the pixels, in threads, and after them a json of key, faults and digests."""
    image_bytes, digests = math.prod(shape[1:]), [None] * len(images)

    def decode(index):
        """Decode an image into the file, not a map, so that a full disk is an error; its fault."""
        try:
            data = images.read(index)
            digests[index] = hashlib.blake2b(data, digest_size=16).hexdigest()
            pixels = images.decode(data, shape[1])
        except ValueError as e:
            return str(e)
        done, pixels = 0, memoryview(pixels).cast("B")
        while done < image_bytes:  # a full disk takes a part; the next call raises its error
            done += os.pwrite(file.fileno(), pixels[done:], index * image_bytes + done)

    # decode in threads; an error cancels the images that are still queued
    pool = ThreadPoolExecutor(cores())
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's: an image decodes or it does not
        try:
            faults = list(tqdm(pool.map(decode, range(len(images))), "decoding", len(images),
                               unit="image", disable=None))
        finally:
            pool.shutdown(cancel_futures=True)

        # append what is known of them
        faults = {index: fault for index, fault in enumerate(faults) if fault}
        file.seek(math.prod(shape))
        file.write(json.dumps([key, faults, digests]).encode())
