"""train.py and bench.py as a user starts them, hundreds of times.

Each command is a process of its own with its own arguments, environment, streams and exit code. Most are forked from a
server that has imported torch already, which saves three seconds each; `fresh=True` starts Python anew, as a shell does.
"""
import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixer.runtime.checkpoint import load_checkpoint
from mixer.runtime.files import read_csv
from mixer.runtime.signals import STOPPING

ROOT = Path(__file__).parent.parent.parent
TINY = ["--arch", "convmixer", "--patch", "8", "--dim", "16", "--depth", "1", "--kernel-size", "3",
        "--image-size", "32", "--batch-size", "8", "--device", "cpu"]
HANGS = 300  # seconds
TIMING = {"images_per_s", "data_wait", "memory_mib"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.commands", "train", "bench", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"])


@dataclass
class Plant:
    """Something that happens inside a command: at call number `call` of the function `where`, its process gets `signum`: before it, or
    `delay` seconds later, whatever runs then."""
    where: str                # module.function, as the command's code looks it up
    signum: int
    call: int = 1
    delay: float = 0

    def set(self):
        module, name = self.where.rsplit(".", 1)
        module = importlib.import_module(module)
        original, calls = getattr(module, name), 0

        def planted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == self.call and self.delay:
                threading.Timer(self.delay, os.kill, (os.getpid(), self.signum)).start()
            elif calls == self.call:
                os.kill(os.getpid(), self.signum)
            return original(*args, **kwargs)
        setattr(module, name, planted)


class Command:
    """A command that has been started. stdout and stderr go to files in `folder`, unless `streams` {0, 1, 2: a path to open, or
    None for closed} says otherwise; `limits` {resource.RLIMIT_...: bytes} hold for it; `ignored` signals are so from the start."""

    def __init__(self, script, arguments, folder, env=None, *, streams=None, limits=None, plants=(), ignored=(), fresh=False):
        folder.mkdir(exist_ok=True)
        stamp = f"{time.time_ns()}"
        streams = {0: os.devnull, 1: folder / f"{stamp}.out", 2: folder / f"{stamp}.err", **(streams or {})}
        self.files = [streams[1], streams[2]]
        arguments, env = [str(ROOT / script), *map(str, arguments)], {**os.environ, **(env or {})}
        if fresh:
            self.process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, start_new_session=True,
                                            preexec_fn=lambda: _prepare(streams, limits, ignored))
        else:
            self.process = forked(_enter, arguments, env, streams, limits, plants, ignored)
        self.pid = self.process.pid

    def send(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def code(self):
        """The exit code, negative for a signal that killed it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def said(self, stream=1):
        path = self.files[stream - 1]
        return Path(path).read_text(errors="replace") if path and Path(path).is_file() else ""

    def wait_for(self, text):
        """Until stdout holds `text`, or the command has ended."""
        wait_until(lambda: text in self.said() or self.code() is not None, self)
        return self

    def wait(self):
        """To its end: CompletedProcess with returncode, stdout and stderr."""
        wait_until(lambda: self.code() is not None, self)
        return subprocess.CompletedProcess(None, self.code(), self.said(1), self.said(2))


def wait_until(true, command=None):
    """Until true() is. On a machine that stands still for seconds that may take as long; five minutes mean that it never comes."""
    until = time.monotonic() + HANGS
    while not true():
        if time.monotonic() > until:
            said = command and command.said() + command.said(2)
            if command:
                command.send(signal.SIGKILL)
            raise AssertionError(f"nothing for {HANGS} s{f': {said}' if said else ''}")
        time.sleep(0.002)


def forked(f, *args):
    """A process of the server's that runs f(*args). The server starts with the first one, and finds train.py by PYTHONPATH."""
    process = SERVER.Process(target=f, args=args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        process.start()
    return process


def _prepare(streams, limits, ignored):
    for signum in STOPPING:  # not what the server has taken over, nor what nohup had pytest ignore
        signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
    for number, path in streams.items():
        if path is None:
            os.close(number)
        else:
            opened = os.open(path, os.O_RDWR | os.O_CREAT if number == 0 or str(path).startswith("/dev/") else os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
    for what, size in (limits or {}).items():
        resource.setrlimit(what, (size, size))


def _enter(arguments, env, streams, limits, plants, ignored):
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    for plant in plants:
        plant.set()
    _prepare(streams, limits, ignored)
    sys.argv = arguments
    sys.stdin, sys.stdout, sys.stderr = (None if streams[n] is None else open(n, mode, closefd=False)
                                         for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    runpy.run_path(arguments[0], run_name="__main__")


def session_members(session):
    """{pid: its state, as of ps} of a command's session, zombies left out."""
    members = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, theirs = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(theirs) == session and state != "Z":
                members[int(path.parent.name)] = state
    return members


def same_run(a, b):
    """Two folders hold one run: weights, optimizer, log and best checkpoint, but for timing."""
    one, other = load_checkpoint(a / "last.pt", whole=True), load_checkpoint(b / "last.pt", whole=True)
    assert all(one["state_dict"][k].equal(other["state_dict"][k]) for k in one["state_dict"])
    for s, t in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(s[k].equal(t[k]) for k in s)
    assert one["state"]["confusion"] == other["state"]["confusion"] and one["scaler"] == other["scaler"]
    assert without_timing(one["state"]["rows"]) == without_timing(other["state"]["rows"])
    assert without_timing(read_csv(a / "log.csv")) == without_timing(read_csv(b / "log.csv"))
    assert len(read_csv(a / "log.csv")) == len(one["state"]["rows"])
    if (a / "best.pt").exists():
        one, other = load_checkpoint(a / "best.pt", whole=True), load_checkpoint(b / "best.pt", whole=True)
        assert all(one["state_dict"][k].equal(other["state_dict"][k]) for k in one["state_dict"])
        assert without_timing([one["row"]]) == without_timing([other["row"]])
    assert (a / "summary.json").exists() == (b / "summary.json").exists()


def without_timing(rows):
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
