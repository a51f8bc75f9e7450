"""Decode every image once, into one uint8 array on disk."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..runtime import signals
from ..runtime.errors import InputError, listed
from ..runtime.files import locked, writable_folder, write_csv, write_json
from .images import DECODING

MAX_DECODING_BYTES = 4 * 2**30  # that a decoder may take beside what the command has; the largest picture allowed needs 1.2 GB
MAX_DECODING_SECONDS = 60       # an image


def cache_folder(name=None):
    """The folder of --cache, or the user's own. Raises InputError where it cannot be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return writable_folder(name or Path(home, "vit-convmixer"), "--cache")


def pack(images, size, cache=None, workers=None):
    """Decode `images` to size x size pixels, or find them decoded: (uint8 array (N, size, size, 3), {index: fault}).

    The array is memory-mapped from a file in `cache` that is made anew when the source, the size or the decoding rule
    changes. A second process waits for the first to make it. Rows of damaged images are zero and listed in the dict.
    """
    cache = cache_folder(cache)
    where = hashlib.sha256(os.fsencode(Path(images.path).absolute())).hexdigest()[:10]
    base = re.sub(r"\W+", "-", Path(images.path).stem) + f"-{where}-{size}px"
    array_path, meta_path = cache / f"{base}.npy", cache / f"{base}.json"
    want = {"fingerprint": images.fingerprint, "count": len(images), "size": size, "decoding": DECODING}
    try:
        with locked(cache / f"{base}.lock", lambda: print("another process decodes these images: waiting", flush=True)):
            packed = _open_packed(array_path, meta_path, want)
            if packed is None:
                temporary = cache / f"{base}.tmp"
                try:
                    faults = _decode_all(images, size, temporary, workers or len(os.sched_getaffinity(0)))
                    meta_path.unlink(missing_ok=True)  # so that an old description never meets a new array
                    os.replace(temporary, array_path)
                    write_json(meta_path, {**want, "faults": faults})
                except OSError:
                    array_path.unlink(missing_ok=True)  # of no use without its description
                    raise
                finally:
                    temporary.unlink(missing_ok=True)
                packed = _open_packed(array_path, meta_path, want)
    except OSError as e:
        raise OSError(f"cannot keep {len(images) * size * size * 3 / 2**20:,.0f} MiB of decoded images in {cache}: "
                      f"{e.strerror or e}; --cache DIR puts them elsewhere") from e
    return packed


def _open_packed(array_path, meta_path, want):
    """What `pack` returns, or None where there is nothing, something else or something damaged."""
    try:
        meta = json.loads(meta_path.read_text())
        faults = {int(index): fault for index, fault in meta.pop("faults").items()}
        array = np.load(array_path, mmap_mode="c")  # copy-on-write: the file is safe from whatever is done to the array
    except Exception:  # damaged bytes make json and numpy raise nearly every type there is
        return None
    fits = meta == want and array.shape == (want["count"], want["size"], want["size"], 3) and array.dtype == np.uint8
    return (array, faults) if fits else None


def _decode_all(images, size, path, workers):
    """Write the array with `workers` processes; returns {index: what is wrong with that image}.

    An image may kill its decoder (it is tried twice, for the system may have been short of memory), or take too much time or memory.
    """
    path.unlink(missing_ok=True)  # a decoder that outlived its command may still write to what that had begun
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (len(images), size, size, 3))
    with open(path, "r+b") as f:  # take the room now: a full disk met through a memory map would kill the process
        os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    context = multiprocessing.get_context("fork")  # the workers need Pillow alone, and start in milliseconds
    faults, left, running, died = {}, {}, {}, set()
    parent = os.getpid()

    def start(indices):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_decode_some, args=(images, size, array, indices, send, parent), daemon=True)
        with signals.blocked():  # nor does one come between a worker's start and its place in `running`, from where it is ended
            process.start()
            left[receive], running[receive] = list(reversed(indices)), process
        send.close()

    try:
        with tqdm(total=len(images), desc="decoding", unit="image", disable=None) as bar:
            for worker in range(min(workers, len(images))):
                start(range(worker, len(images), workers))
            while running:
                for receive in wait(list(running)):
                    try:
                        while receive.poll():
                            fault, index = receive.recv(), left[receive].pop()
                            if fault:
                                faults[index] = fault
                            bar.update()
                    except EOFError:  # done, or killed by the image it was at
                        process, rest = running.pop(receive), left.pop(receive)
                        process.join()
                        if rest and (rest[-1] in died or process.exitcode == -signal.SIGALRM):
                            faults[rest.pop()] = _of_what(process.exitcode)
                            bar.update()
                        elif rest:
                            died.add(rest[-1])
                        if rest:
                            start(rest[::-1])
                signals.check()
                time.sleep(0.02)  # a core is worth more to a decoder than to a parent woken for every image
    finally:
        for process in running.values():
            process.kill()
            process.join()
    array.flush()
    return dict(sorted(faults.items()))


def _decode_some(images, size, array, indices, send, parent):
    """One worker: fill the rows `indices`, in that order, and send for each None or what is wrong with it."""
    signals.die_with_parent(parent)
    warnings.simplefilter("ignore")  # Pillow's: an image decodes or it does not
    with open("/proc/self/statm") as f:
        most = int(f.read().split()[0]) * resource.getpagesize() + MAX_DECODING_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))  # beyond it, MemoryError
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        for index in indices:
            signal.alarm(MAX_DECODING_SECONDS)  # unhandled, SIGALRM kills, in whatever library the time is spent
            try:
                array[index] = images.load(index, size)
            except ValueError as e:
                send.send(str(e))
            else:
                send.send(None)


def _of_what(exitcode):
    if exitcode == -signal.SIGALRM:
        return f"its decoder took more than {MAX_DECODING_SECONDS} s"
    return f"its decoder died twice, with exit code {exitcode}"


def usable(images, faults, policy, report):
    """Indices of the images that decode, int64. Damaged ones are written to the csv file `report`, unless that is None.

    policy "report": any damaged image raises InputError that names them; "skip": they are left out, and counted.
    """
    if not faults:
        return np.arange(len(images))
    rows = [{"image": images.files[index], "fault": fault} for index, fault in faults.items()]
    if report:
        write_csv(report, rows)
    said = listed((f"{row['image']} ({row['fault']})" for row in rows), 8)
    if policy == "report":
        raise InputError(f"--data: {len(faults):,} of {len(images):,} images do not decode: {said}. The whole list is in "
                         f"{report}; mend or remove them, or leave them out with --bad-images skip")
    print(f"left out {len(faults):,} of {len(images):,} images that do not decode: {said}; the list is in {report}", flush=True)
    good = np.setdiff1d(np.arange(len(images)), list(faults))
    there = {images.labels[i] for i in good}
    empty = [name for label, name in enumerate(images.classes) if label not in there]
    if empty:
        raise InputError(f"--data: no image of class {listed(empty)} decodes")
    return good
