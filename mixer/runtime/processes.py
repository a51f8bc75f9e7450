"""Run a function in a fresh process and return its result, its error or its exit code."""
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker

import torch

from . import signals
from .errors import Interrupted, first_line

SPAWN = multiprocessing.get_context("spawn")
TORCHRUN = "TORCHELASTIC_RUN_ID"  # an environment variable that torchrun sets for its workers


class ChildFailed(RuntimeError):
    """What went wrong in a fresh process, in one line. `trace` is its traceback."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU or of the machine ran out."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(e) for words in ("can't allocate memory", "size calculation overflowed",
                                "MPS backend out of memory"))


def in_one_line(e: BaseException) -> str:
    """An exception for a table. Every kind of exhausted memory reads the same."""
    kind = "out of memory" if out_of_memory(e) else type(e).__name__
    return f"{kind}: {first_line(e)}"


def in_fresh_process(f: Callable, *args):
    """Return f(*args), run in a fresh process. Raises ChildFailed if that fails or dies.

    After a signal the process ends first, then Interrupted is raised.
    """
    exit_code, answer = _run(f, args)
    signals.check()
    if answer is None:
        killed = " (killed: out of memory?)" if exit_code == -signal.SIGKILL else ""
        raise ChildFailed(f"its process ended with exit code {exit_code}{killed}")
    result, failure = answer
    if failure:
        raise ChildFailed(*failure)
    return result


def attempt(f: Callable, *args, debug: bool = False) -> tuple[object, str | None]:
    """`in_fresh_process` for a table: (result, None), or (None, the error in one line).

    debug: print the traceback.
    """
    try:
        return in_fresh_process(f, *args), None
    except ChildFailed as e:
        if debug:
            print(e.trace, file=sys.stderr)
        return None, str(e)


def exit_code_of(f: Callable, *args) -> int:
    """Run f(*args), which exits, in a fresh process. Return its exit code as a shell does.

    A signal does not interrupt this: the process receives it, and may save before it exits.
    """
    exit_code, answer = _run(_own_exit_code, (f, *args))
    if answer and answer[0] is not None:  # its word counts, whoever waited for the process
        return answer[0]
    if not exit_code:  # it failed, or nobody knows
        return 1
    return exit_code if exit_code > 0 else 128 - exit_code


def _own_exit_code(f, *args):
    """The exit code of f(*args), which exits."""
    try:
        f(*args)
    except SystemExit as e:
        return e.code or 0
    return 0


def _run(f, args):
    """Run f(*args) in a fresh process until it ends: its exit code and its answer, if any.

    The exit code is None where another part of this program has waited for the process.

    A signal sent to this process is passed on. If this process dies, the other one does, too.
    """
    receive, send = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_answer, args=(send, os.getpid(), f, args))

    def pass_on(signum):
        if process.is_alive():
            os.kill(process.pid, signum)

    resource_tracker.ensure_running()  # `start` starts it otherwise, which unblocks the signals
    with signals.deferred(pass_on):
        with signals.blocked():  # until its imports are done and it listens
            process.start()
        if signum := signals.pending():
            pass_on(signum)
        send.close()
        try:
            answer = receive.recv()
        except EOFError:  # it has ended without an answer
            answer = None
        process.join()
    return process.exitcode, answer


def _answer(send, parent, f, args):
    """The fresh process: sends (result, None), or (None, (error in one line, traceback))."""
    os.setsid()  # Ctrl-C in a terminal reaches the parent alone, which passes it on
    signals.die_with_parent(parent)
    os.environ.pop(TORCHRUN, None)  # torchrun is not its parent
    try:
        signals.listen()
        send.send((f(*args), None))
    except Interrupted as e:
        sys.exit(e.exit_code)
    except Exception as e:
        send.send((None, (in_one_line(e), traceback.format_exc())))
        sys.exit(1)
