"""Run a function in a process of its own, and hear what became of it."""
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback

import torch

from . import signals


class ChildFailed(RuntimeError):
    """What went wrong in a fresh process, in one line; `trace` has the rest."""

    def __init__(self, message, trace=""):
        super().__init__(message)
        self.trace = trace


def out_of_memory(e):
    """Whether an exception says that memory ran out, the GPU's or the machine's."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(e) for words in ("can't allocate memory", "size calculation overflowed"))


def in_one_line(e):
    """An exception for a table; every kind of memory that ran out reads the same."""
    text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    if out_of_memory(e):
        return f"out of memory: {text}"
    return f"{type(e).__name__}: {text}"


def in_fresh_process(f, *args):
    """f(*args) in a process that has done nothing before, gone when this returns. Raises ChildFailed when it failed or died."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, os.getpid(), f, args))  # no daemon: it may have decoders of its own
    with signals.deferred():  # none comes between its start and the `try` that ends it
        process.start()
    send.close()
    try:
        signals.check()
        result, failure = receive.recv()
    except EOFError:
        process.join()
        killed = " (killed: out of memory?)" if process.exitcode == -signal.SIGKILL else ""
        raise ChildFailed(f"its process ended with exit code {process.exitcode}{killed}") from None
    except BaseException:  # Ctrl-C, SIGTERM: it would go on for minutes
        process.terminate()
        process.join(10)
        process.kill()
        raise
    finally:
        process.join()
    if failure:
        raise ChildFailed(*failure)
    return result


def attempt(f, *args, debug=False):
    """`in_fresh_process` for a table: (f(*args), {}), or (None, {"failed": the reason in one line}); debug prints the traceback."""
    try:
        return in_fresh_process(f, *args), {}
    except ChildFailed as e:
        if debug:
            print(e.trace, file=sys.stderr)
        return None, {"failed": str(e)}


def _answer(send, parent, f, args):
    signals.die_with_parent(parent)
    for signum in signals.STOPPING:  # a terminal's reach both; the parent ends this one
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # so that temporary folders go
    try:
        answer = f(*args), None
    except Exception as e:  # told by the parent, in its table
        answer = None, (in_one_line(e), traceback.format_exc())
    send.send(answer)

TORCHRUN = "TORCHELASTIC_RUN_ID"  # which it sets for the processes that it starts


def call(command):
    """Run a command to its end and return its exit code, as a shell does where a signal ended it. Signals sent to us are passed
    on, for it to stop in order."""
    env = {name: value for name, value in os.environ.items() if name != TORCHRUN}  # this is its parent, not torchrun
    child = subprocess.Popen([str(word) for word in command], start_new_session=True, env=env,
                             preexec_fn=functools.partial(signals.die_with_parent, os.getpid()))
    with signals.deferred(child.send_signal):
        code = child.wait()
    return code if code >= 0 else 128 - code
