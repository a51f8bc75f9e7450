"""The errors that a command reports, and their exit codes.

0 done, 1 failed while running, 2 wrong usage or input, 3 diverged.
130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP, 138 by SIGUSR1.
"""
import signal
from collections.abc import Iterable

import torch


class InputError(ValueError):
    """Wrong arguments or data. The message names the flag or the file, and what to do."""

    exit_code = 2


class Diverged(RuntimeError):
    """The loss or the weights are not finite."""

    exit_code = 3


class Interrupted(Exception):
    """Stopped by a signal."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(f"stopped by {signal.Signals(signum).name}{message}")
        self.exit_code = 128 + signum


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU or of the machine ran out."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(e) for words in ("can't allocate memory", "size calculation overflowed"))


def message(e: BaseException) -> str:
    """What a command says of an exception, in one line."""
    line = printable(e if isinstance(e, InputError) else first_line(e))
    if out_of_memory(e):
        return f"out of memory ({line}): try a smaller --batch-size, --image-size or model"
    return line


def printable(text: object) -> str:
    """Text that is safe to print: a file name may move the cursor, start a line or not encode."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def first_line(e: BaseException) -> str:
    """The first line of an exception's message, or the name of its type."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def listed(words: Iterable, most: int = 10) -> str:
    """`a, b, c and 7 more`: a readable list of any length."""
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(printable(word) for word in words[:most]) + more
