"""Ctrl-C, SIGTERM and SIGHUP, the signals that stop a command.

The first signal raises Interrupted, so that files and processes are put away. Inside `deferred()`
nothing is raised: the loop finishes its step, looks at `pending()` and saves. A second Ctrl-C
exits at once.
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

from .errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1

_first: int | None = None  # the signal that came first
_raised = False            # whether it has raised Interrupted
_callback: Callable[[int], object] | None = None  # inside `deferred`: called instead of raising


def listen() -> None:
    """Take over the signals, except those that our parent ignores, as nohup does."""
    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a fresh process starts with them blocked


def pending() -> int | None:
    """The signal that came first, or None."""
    return _first


def was_raised() -> bool:
    """Whether a signal raised Interrupted. C++ code may have turned it into another error."""
    return _raised


def check() -> None:
    """Raise Interrupted if a signal came. Python drops the first one if a `__del__` was running."""
    if _first:
        raise Interrupted(_first)


@contextlib.contextmanager
def deferred(callback: Callable[[int], object] = lambda signum: None) -> Iterator[None]:
    """Inside, a signal raises nothing. It sets `pending()` and calls `callback(signum)`."""
    global _callback
    before = _callback
    _callback = callback
    try:
        yield
    finally:
        _callback = before


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside, no signal arrives. A process started inside receives none until it calls `listen`.

    A signal sent meanwhile sets `pending()` at the end, and raises nothing: call `check` later.
    Around a fork Python runs hooks in which it ignores exceptions, so Interrupted would be lost.
    """
    with deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_signal(signum, frame):
    global _first, _raised
    repeated = _first is not None
    if not repeated:
        _first = signum
    if repeated and signum == signal.SIGINT:
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + signum)
    if _callback is not None:
        _callback(signum)
    elif not repeated:
        _raised = True
        raise Interrupted(signum)


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Called in a child of process `parent`: the system sends it `signum` when the parent ends.

    prctl(2), Linux alone. However the parent ends, kill -9 included.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
