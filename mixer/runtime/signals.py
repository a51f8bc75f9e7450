"""Ctrl-C, SIGTERM and SIGHUP, the signals that stop a command.

The first signal raises Interrupted, so that files and processes are put away. Inside `deferred()`
nothing is raised: the loop finishes its step, looks at `pending()` and saves. A second Ctrl-C
exits at once.
"""
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

from .errors import Interrupted
from .system import set_death_signal

# Windows has no SIGHUP
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                 if hasattr(signal, name))

_first: int | None = None  # the signal that came first
_raised = False            # whether it has raised Interrupted
_callback: Callable[[int], object] | None = None  # inside `deferred`: called instead of raising


def listen() -> None:
    """Take over the signals, except those that our parent ignores, as nohup does.

    Handlers that are not Python's stay, too: nobody could give them back. SIGCHLD is no longer
    ignored: otherwise the system forgets exit codes, and a failed process looks like a good one.
    """
    for signum in STOPPING:
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
            signal.signal(signum, _on_signal)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a fresh process starts with them blocked


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """`listen` inside. Afterwards handlers, blocked signals and `pending()` are as before."""
    global _first, _raised, _callback
    state = _first, _raised, _callback
    handlers = {signum: signal.getsignal(signum) for signum in (*STOPPING, signal.SIGCHLD)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        listen()
        yield
    finally:
        with deferred():  # nothing is raised any more
            _give_back(handlers, mask)
        _first, _raised, _callback = state


def _give_back(handlers, mask):
    for signum, handler in handlers.items():
        if handler is not None:
            signal.signal(signum, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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


def die_with_parent(parent: int, signum: int = 9) -> int:
    """Called in a child of process `parent`: the system sends it `signum` when the parent ends.

    9 is SIGKILL, a name that Windows lacks. However the parent ends, kill -9 included; on Linux
    alone. Returns the signal that was set before.
    """
    before = set_death_signal(signum)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
    return before
