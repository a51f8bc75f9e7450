"""The signals that stop this process; commands and functions in processes of their own."""
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable

from .errors import first_line, out_of_memory

SPAWN = multiprocessing.get_context("spawn")
# Ctrl-C, and what a scheduler and a terminal that closes send; SIGUSR1: Slurm's --signal=USR1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stop:
    """Inside `with`, the first signal sets `signum`: the loop ends its step, saves and exits.

    A second Ctrl-C ends the process at once. Other signals often come twice: `timeout` sends two,
    and so does a terminal that closes. Ignored signals stay ignored, as under nohup.
    """

    def __init__(self):
        self.signum, self.child = 0, None

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self) for signum in STOPPING
                       if signal.getsignal(signum) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self, signum, frame):
        if self.child:
            self.child.send_signal(signum)  # does nothing if it has ended
        if self.signum and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.signum = self.signum or signum

    def run(self, command: list[str]) -> int:
        """Run a command and pass the signals on to it. Returns its exit code, as a shell has it."""
        # in a session of its own: Ctrl-C in a terminal reaches this process alone
        self.child = subprocess.Popen(command, start_new_session=True)
        if self.signum:  # it came before there was a child
            self.child.send_signal(self.signum)
        code = self.child.wait()
        return code if code >= 0 else 128 - code


def error_line(e: BaseException) -> str:
    """An exception for a table. All out-of-memory errors read alike."""
    kind = "out of memory" if out_of_memory(e) else type(e).__name__
    return f"{kind}: {first_line(e)}"


def in_fresh_process(f: Callable, *args) -> tuple[object, str | None]:
    """(f(*args), None) from a fresh process, or (None, the error there, in one line)."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_send_result, args=(sender, f, args))
    try:
        process.start()
    except OSError as e:  # the system cannot start another process
        return None, error_line(e)
    sender.close()  # so that the pipe ends with the process
    try:
        return receiver.recv()
    except EOFError:
        return None, "its process was killed (out of memory?)"
    finally:
        process.kill()  # at Ctrl-C; else it has sent its result
        process.join()


def _send_result(sender, f, args):
    """In the fresh process. Many exceptions cannot be sent to another process; text can."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = f(*args), None
    except Exception as e:
        result = None, error_line(e)
    sender.send(result)


def _end_with_parent():
    """A process that outlives a killed command would slow down what the next one measures."""
    multiprocessing.parent_process().join()
    os._exit(1)
