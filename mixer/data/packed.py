"""Decode every image once, into one uint8 array on disk."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
import warnings
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..runtime import signals
from ..runtime.errors import InputError, listed
from ..runtime.files import cache_home, locked, reserve, writable_folder, write_csv, write_json
from ..runtime.system import cores, limit_memory
from .decoding import DECODING
from .images import ImageSet, base_name

MAX_DECODING_BYTES = 4 * 2**30  # of memory for a decoder; the largest picture needs 1.2 GB
MAX_DECODING_SECONDS = 60       # per image
# a decoder needs only Pillow, and starts in a moment (Windows cannot fork, and runs no command)
FORK = multiprocessing.get_context(
    "fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def cache_folder(name: Path | str | None = None) -> Path:
    """The folder of --cache, or the user's own. Raises InputError if it is not writable."""
    return writable_folder(name or cache_home() / "vit-convmixer", "--cache")


def pack(images: ImageSet, size: int, cache: Path | str | None = None,
         workers: int | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Decode `images` to size x size pixels: (uint8 array (N, size, size, 3), {index: fault}).

    The array is memory-mapped from a file in `cache`, which is made again when the source, the size
    or DECODING changes. A second process waits until the first has made it. Damaged images are zero
    in the array. Sets `images.crcs`. Raises OSError where the file cannot be written.
    """
    cache, source = cache_folder(cache), Path(images.path)
    path_hash = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:10]
    name = re.sub(r"\W+", "-", Path(base_name(source)).stem) + f"-{path_hash}-{size}px"
    array_path, meta_path, temporary, lock = (
        cache / f"{name}.{suffix}" for suffix in ("npy", "json", "tmp", "lock"))
    expected = dict(fingerprint=images.fingerprint, count=len(images), size=size, decoding=DECODING)
    busy = "another process is decoding these images: waiting for it"
    try:
        with locked(lock, lambda: print(busy, flush=True)):
            if packed := _open_packed(array_path, meta_path, expected, images):
                return packed
            try:
                faults, crcs = _decode_all(images, size, temporary, workers or cores())
                meta_path.unlink(missing_ok=True)  # never an old description with a new array
                os.replace(temporary, array_path)
                write_json(meta_path, {**expected, "faults": faults, "crcs": crcs})
            except OSError:
                array_path.unlink(missing_ok=True)  # useless without its description
                raise
            finally:
                temporary.unlink(missing_ok=True)
            return _open_packed(array_path, meta_path, expected, images)
    except OSError as e:
        mib = len(images) * size * size * 3 / 2**20
        raise OSError(f"cannot keep {mib:,.0f} MiB of decoded images in {cache}: "
                      f"{e.strerror or e}; choose another folder with --cache") from e


def _open_packed(array_path, meta_path, expected, images):
    """The result of `pack`; None if a file is missing or damaged, or does not match `expected`."""
    try:
        meta = json.loads(meta_path.read_text())
        faults = {int(index): fault for index, fault in meta.pop("faults").items()}
        crcs = [crc and int(crc) for crc in meta.pop("crcs")]
        array = np.load(array_path, mmap_mode="c")  # copy-on-write: nobody can change the file
    except Exception:  # on damaged bytes, json and numpy raise nearly every exception type
        return None
    shape = (expected["count"], expected["size"], expected["size"], 3)
    if (meta != expected or len(crcs) != len(images)
            or array.shape != shape or array.dtype != np.uint8):
        return None
    images.crcs = crcs
    return array, faults


def _decode_all(images, size, path, workers):
    """Write the array to `path` with `workers` processes: {index: fault} and the CRCs."""
    # take the disk space first: a full disk under a memory map would kill the process
    path.unlink(missing_ok=True)  # a decoder of a killed command may still write to the old file
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (len(images), size, size, 3))
    reserve(path)

    # decode
    faults, crcs = {}, list(images.crcs)
    decoders = [Decoder(images, size, array, range(worker, len(images), workers))
                for worker in range(min(workers, len(images)))]
    try:
        with tqdm(total=len(images), desc="decoding", unit="image", disable=None) as bar:
            for decoder in decoders:
                decoder.start()
            while running := [decoder for decoder in decoders if decoder.unfinished]:
                wait([decoder.results for decoder in running])
                for decoder in running:
                    for index, fault, crc in decoder.finished():
                        faults[index], crcs[index] = fault, crc
                        bar.update()
                time.sleep(0.02)  # waking up for every image would take a core from the decoders
    finally:
        for decoder in decoders:
            decoder.kill()
    array.flush()
    return {index: fault for index, fault in sorted(faults.items()) if fault}, crcs


class Decoder:
    """A process that decodes the images `indices`, in this order, into their rows of `array`.

    If an image kills the process, another one goes on. It tries this image once more, because the
    system may have been short of memory, but not if the image took too much time. (In
    concurrent.futures, one dead process ends the others, and the image that killed it is unknown.)
    """

    def __init__(self, images, size, array, indices):
        self.images, self.size, self.array = images, size, array
        self.unfinished = deque(indices)  # the process decodes the first one of these
        self.died_at = None               # the last image that killed the process
        self.process = None

    def start(self):
        self.results, send = FORK.Pipe(duplex=False)
        with signals.blocked():  # until `kill` can find the process
            process = FORK.Process(target=self._decode, args=(send, os.getpid()), daemon=True)
            process.start()
            self.process = process
        send.close()

    def finished(self):
        """Yield (index, fault or None, CRC-32 or None) for each image that was finished since."""
        try:
            while self.results.poll():
                fault, crc = self.results.recv()
                yield self.unfinished.popleft(), fault, crc
        except EOFError:  # the process has ended
            self.process.join()
            if not self.unfinished:
                return
            index, exitcode, fault = self.unfinished[0], self.process.exitcode, None
            if exitcode == -signal.SIGALRM:
                fault = f"its decoder took more than {MAX_DECODING_SECONDS} s"
            elif index == self.died_at:
                fault = f"its decoder died twice, with exit code {exitcode}"
            if fault:
                yield self.unfinished.popleft(), fault, self.images.crcs[index]
            self.died_at = index
            if self.unfinished:
                self.start()

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.join()

    def _decode(self, results, parent):
        """In the process: send for each image its fault or None, and its CRC."""
        signals.die_with_parent(parent)
        warnings.simplefilter("ignore")  # Pillow's: an image decodes or it does not
        limit_memory(MAX_DECODING_BYTES)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the command inherited
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            for index in self.unfinished:
                signal.alarm(MAX_DECODING_SECONDS)  # SIGALRM kills, whatever library is running
                fault = None
                try:
                    self.array[index] = self.images.load(index, self.size)
                except ValueError as e:
                    fault = str(e)
                results.send((fault, self.images.crcs[index]))


def usable(images: ImageSet, faults: dict[int, str], policy: str,
           report: Path | str | None) -> np.ndarray:
    """Indices of the images that decode, int64. Writes the others to the csv file `report`, if any.

    policy "report": raises InputError if any image is damaged; "skip": prints which are skipped.
    """
    if not faults:
        return np.arange(len(images))
    rows = [{"image": images.files[index], "fault": fault} for index, fault in faults.items()]
    if report:
        write_csv(report, rows)
    count = f"{len(faults):,} of {len(images):,} images"
    details = listed((f"{row['image']} ({row['fault']})" for row in rows), 8)
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
