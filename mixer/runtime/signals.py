"""Ctrl-C, SIGTERM and SIGHUP: heard from a command's first line on, whatever it is doing.

While Python imports torch, which takes seconds, a signal ends the command at once: nothing has been begun. Later it raises
Interrupted, so that files and processes are put away; inside `deferred()` it only waits in `pending()`, for the loop to
finish its step and save. A second Ctrl-C leaves at once, wherever it comes.

Imports nothing slow: scripts call `listen()` before their other imports.
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal

from .errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
_signum = None      # the first that came
_raised = False
_on_signal = "leave"  # or "raise", or what `deferred` was given


def listen():
    """Take over the signals, but for those that our parent had ignored, as nohup does."""
    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _heard)


def start_raising():
    """The imports are done: from now on a signal raises Interrupted."""
    global _on_signal
    _on_signal = "raise"


def pending():
    """The signal that came first, or None."""
    return _signum


def was_raised():
    """Whether a signal raised Interrupted: another exception may be what a library, in C++, has made of that."""
    return _raised


def check():
    """Raise Interrupted if a signal came: the first exception can be lost where Python ignores one, as in a `__del__`."""
    if _signum:
        raise Interrupted(_signum)


@contextlib.contextmanager
def deferred(then=lambda signum: None):
    """Inside, a signal only sets `pending()`, and calls `then` with its number."""
    global _on_signal
    before, _on_signal = _on_signal, then
    try:
        yield
    finally:
        _on_signal = before


@contextlib.contextmanager
def blocked():
    """Processes forked inside never hear the signals, which a terminal sends to all of a group: their parent ends them. And the
    parent hears none meanwhile, not in the hooks that run around a fork, where Python ignores exceptions: `check` afterwards."""
    with deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heard(signum, frame):
    global _signum, _raised
    first, _signum = _signum is None, _signum or signum
    if signum == signal.SIGINT and not first:
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + signum)
    if first and _on_signal == "leave":
        with contextlib.suppress(OSError):
            os.write(2, f"{Interrupted(signum)}\n".encode())
        os._exit(128 + signum)
    if callable(_on_signal):
        _on_signal(signum)
    elif first and _on_signal == "raise":
        _raised = True
        raise Interrupted(signum)


def die_with_parent(parent, signum=signal.SIGKILL):
    """Called in a child of process `parent`: it gets `signum` when that ends, by whatever (Linux, prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)
