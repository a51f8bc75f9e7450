"""Run a function in a fresh process: its result, or why there is none."""
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from .errors import first_line

SPAWN = multiprocessing.get_context("spawn")


class ChildFailed(RuntimeError):
    """What went wrong in a fresh process, in one line."""


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU or of the machine ran out."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(e) for words in ("can't allocate memory", "size calculation overflowed"))


def in_one_line(e: BaseException) -> str:
    """An exception for a table. Every kind of exhausted memory reads the same."""
    kind = "out of memory" if out_of_memory(e) else type(e).__name__
    return f"{kind}: {first_line(e)}"


def attempt(f: Callable, *args, debug: bool = False) -> tuple[object, str | None]:
    """(f(*args), None) from a fresh process, or (None, the error there, in one line).

    debug: print the traceback.
    """
    try:
        return in_fresh_process(f, *args), None
    except ChildFailed as e:
        if debug:
            traceback.print_exc()
        return None, str(e)


def in_fresh_process(f: Callable, *args):
    """Return f(*args), run in a fresh process. Raises ChildFailed if that fails or dies."""
    fresh = ProcessPoolExecutor(1, mp_context=SPAWN, initializer=_end_with_parent)
    wait = True
    try:
        return fresh.submit(_call, f, args).result()
    except BrokenProcessPool:
        raise ChildFailed("its process was killed (out of memory?)") from None
    except KeyboardInterrupt:  # perhaps before the executor's thread has started
        wait = False
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        fresh.shutdown(wait)


def _call(f, args):
    """In the fresh process. Many exceptions cannot be sent to another process; text can."""
    try:
        return f(*args)
    except Exception as e:
        raise ChildFailed(in_one_line(e)) from e


def _end_with_parent():
    """What a killed command leaves behind would slow down what the next one measures."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()
