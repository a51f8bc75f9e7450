"""Decode every image once, into one uint8 array on disk."""
import errno
import hashlib
import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..runtime.errors import InputError, listed
from ..runtime.files import cache_home, locked, writable_folder, write_csv, write_json
from .decoding import DECODING
from .images import ImageSet, base_name


def cache_folder(name: Path | str | None = None) -> Path:
    """The folder of --cache, or the user's own. Raises InputError if it is not writable."""
    return writable_folder(name or cache_home() / "vit-convmixer", "--cache")


def pack(images: ImageSet, size: int, cache: Path | str | None = None
         ) -> tuple[np.ndarray, dict[int, str], list[str | None]]:
    """Decode `images` to size x size pixels.

    Returns a uint8 array (N, size, size, 3), {index: fault} of the damaged images, which are zero
    in the array, and a digest of each file's bytes, None where it cannot be read. The array is
    memory-mapped from a file in `cache`, which is made again when the source, the size or DECODING
    changes. A second process waits until the first has made it. Raises OSError where the file
    cannot be written.
    """
    cache, source = cache_folder(cache), Path(images.path)
    path_hash = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:10]
    name = re.sub(r"\W+", "-", Path(base_name(source)).stem) + f"-{path_hash}-{size}px"
    array_path, meta_path, temporary, lock = (
        cache / f"{name}.{suffix}" for suffix in ("npy", "json", "tmp", "lock"))
    expected = dict(key=images.cache_key, count=len(images), size=size, decoding=DECODING)
    busy = "another process is decoding these images: waiting for it"
    try:
        with locked(lock, lambda: print(busy, flush=True)):
            if packed := _open_packed(array_path, meta_path, expected):
                return packed
            try:
                faults, digests = _decode_all(images, size, temporary)
                meta_path.unlink(missing_ok=True)  # never an old description with a new array
                os.replace(temporary, array_path)
                write_json(meta_path, {**expected, "faults": faults, "digests": digests})
            except OSError:
                array_path.unlink(missing_ok=True)  # useless without its description
                raise
            finally:
                temporary.unlink(missing_ok=True)
            return _open_packed(array_path, meta_path, expected)
    except OSError as e:
        mib = len(images) * size * size * 3 / 2**20
        raise OSError(f"cannot keep {mib:,.0f} MiB of decoded images in {cache}: "
                      f"{e.strerror or e}; choose another folder with --cache") from e


def _open_packed(array_path, meta_path, expected):
    """The result of `pack`; None if a file is missing or damaged, or does not match `expected`."""
    try:
        meta = json.loads(meta_path.read_text())
        faults = {int(index): fault for index, fault in meta.pop("faults").items()}
        digests = meta.pop("digests")
        array = np.load(array_path, mmap_mode="c")  # copy-on-write: nobody can change the file
    except Exception:  # on damaged bytes, json and numpy raise nearly every exception type
        return None
    shape = (expected["count"], expected["size"], expected["size"], 3)
    if meta != expected or array.shape != shape or array.dtype != np.uint8:
        return None
    return array, faults, digests


def _decode_all(images, size, path):
    """Write the array to `path`, in threads: {index: fault}, and a digest of each file."""
    path.unlink(missing_ok=True)  # of a command that was killed
    shape, row = (len(images), size, size, 3), size * size * 3
    start = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset
    digests = [None] * len(images)

    def decode(index):
        """The fault of an image, or None. Written, not mapped: a full disk is then an error."""
        try:
            data = images.read(index)
            digests[index] = hashlib.blake2b(data, digest_size=16).hexdigest()
            pixels = images.decode(data, size)
        except ValueError as e:
            return str(e)
        if os.pwrite(file.fileno(), pixels, start + index * row) < row:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return None
    pool = ThreadPoolExecutor()
    with open(path, "r+b") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's: an image decodes or it does not
        try:
            faults = list(tqdm(pool.map(decode, range(len(images))), "decoding", len(images),
                               unit="image", disable=None))
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(file.fileno())
    return {index: fault for index, fault in enumerate(faults) if fault}, digests


def usable(images: ImageSet, faults: dict[int, str], policy: str,
           report: Path | str | None) -> np.ndarray:
    """Indices of the images that decode, int64. Writes the others to the csv file `report`, if any.

    policy "report": raises InputError if any image is damaged; "skip": prints which are skipped.
    """
    if not faults:
        return np.arange(len(images))
    if report:
        write_csv(report, [{"image": images.files[index], "fault": fault}
                           for index, fault in faults.items()])
    count = f"{len(faults):,} of {len(images):,} images"
    details = listed((f"{images.files[index]} ({fault})" for index, fault in faults.items()), 8)
    if policy == "report":
        raise InputError(f"--data: {count} do not decode: {details}. All are listed in {report}; "
                         "repair or remove them, or skip them with --bad-images skip")
    print(f"skipped {count} that do not decode: {details}; all are listed in {report}", flush=True)
    indices = np.setdiff1d(np.arange(len(images)), list(faults))
    labels = {images.labels[index] for index in indices}
    missing = [name for label, name in enumerate(images.classes) if label not in labels]
    if missing:
        raise InputError(f"--data: no image of class {listed(missing)} decodes")
    return indices
