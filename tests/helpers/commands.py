"""train.py and bench.py as a user starts them, hundreds of times.

Each command is a process with its own arguments, environment, output files and exit code. Most are
forked from a server that has imported torch already, which saves three seconds each; `fresh=True`
starts a new Python, as a shell does.
"""
import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixer.runtime.processes import STOPPING

ROOT = Path(__file__).parent.parent.parent
TINY = ["--arch", "convmixer", "--patch", "8", "--dim", "16", "--depth", "1",
        "--kernel-size", "3", "--image-size", "32", "--batch-size", "8", "--device", "cpu"]
TINY_VIT = ["--arch", "vit_linear", "--patch", 8, "--dim", 16, "--heads", 2, "--depth", 1,
            "--image-size", 32, "--batch-size", 8, "--device", "cpu"]
SHORT = [*TINY, "--steps", 60, "--log-every", 5, "--lr", 0.003, "--schedule", "cosine",
         "--warmup", 5]
EXIT_CODES = {signum: 128 + signum for signum in STOPPING}
HANGS = 300  # seconds after which a test gives up
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.commands", "train", "bench", "torch._dynamo",
                               "mixer.report.pictures",
                               "matplotlib.figure", "matplotlib.backends.backend_agg"])


class Command:
    """A command that has been started. limits: {resource.RLIMIT_...: bytes}; stdout, which they
    would cut, is then thrown away. plants: faults inside the command, see helpers/plants.py."""

    def __init__(self, script, arguments, folder, env=None, *, limits=None, plants=(), fresh=False):
        assert not (fresh and plants), "a fault can only be planted in a forked command"
        folder.mkdir(exist_ok=True)
        stamp = time.time_ns()
        self.files = {1: os.devnull if limits else folder / f"{stamp}.out",
                      2: folder / f"{stamp}.err"}
        self.plants = {folder / f"{stamp}.planted{i}": plant for i, plant in enumerate(plants)}
        streams = {0: os.devnull, **self.files}
        arguments = [str(ROOT / script) if is_file(script) else script, *map(str, arguments)]
        env = {**os.environ, **(env or {})}
        if fresh:
            module = [] if is_file(script) else ["-m"]
            self.process = subprocess.Popen(
                [sys.executable, *module, *arguments], cwd=ROOT, env=env, start_new_session=True,
                preexec_fn=lambda: _prepare(streams, limits))
        else:
            self.process = forked(_enter, arguments, env, streams, limits, self.plants)
        self.pid = self.process.pid

    def send(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def code(self):
        """The exit code, negative for a signal that killed it; None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def output(self, stream=1):
        """What it has written to a stream so far."""
        path = self.files[stream]
        return Path(path).read_text(errors="replace") if Path(path).is_file() else ""

    def wait_for(self, text):
        """Until stdout holds `text`, or the command has ended."""
        wait_until(lambda: text in self.output() or self.code() is not None, self)
        return self

    def ends_within(self, seconds):
        end = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.code() is not None

    def wait_until_it_listens(self):
        """Until its loop catches signals, or it has ended."""
        wait_until(lambda: listens(self.pid) or self.code() is not None, self)

    def wait_for_its_children(self):
        """Until nothing of its session runs: the system takes a moment to bury what was killed."""
        wait_until(lambda: not running(session=self.pid))

    def wait(self):
        """Until the end: CompletedProcess with returncode, stdout and stderr. Raises AssertionError
        when a planted fault has not happened: then the test shows nothing."""
        wait_until(lambda: self.code() is not None, self)
        result = subprocess.CompletedProcess(None, self.code(), self.output(1), self.output(2))
        missed = [plant for marker, plant in self.plants.items() if not marker.exists()]
        assert not missed, f"planted, but never happened: {missed}, in {result}"
        return result


def succeeded(result):
    """The result of a command, which must have ended with exit code 0."""
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    return result


def run_python(*arguments, **env):
    """The result of a new Python in this repository, which must have ended with exit code 0."""
    return succeeded(subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True,
                                    env={**os.environ, **env}, capture_output=True))


def assert_error(result, code, *words):
    """It ended with this exit code, and one line that has all the words."""
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def wait_until(condition, command=None):
    """Until condition() is true. Raises AssertionError after HANGS, which a busy machine never
    needs, and kills the command."""
    end = time.monotonic() + HANGS
    while not condition():
        if time.monotonic() > end:
            output = ""
            if command:
                output = command.output(1) + command.output(2)
                command.send(signal.SIGKILL)
            raise AssertionError(f"nothing for {HANGS} s: {output}")
        time.sleep(0.002)


def is_file(script):
    """Whether a command is a file, as train.py, or a module, as mixer.predict."""
    return script.endswith(".py")


def forked(f, *args):
    """Start a process, forked from the server, that runs f(*args). The first call starts the
    server, which finds train.py by PYTHONPATH. The server skips, without an error, what it cannot
    import."""
    process = SERVER.Process(target=f, args=args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        process.start()
    return process


def _prepare(streams, limits):
    """Signals, streams and limits of this process, as its parent wants them."""
    for signum in STOPPING:  # not as in the server, nor as nohup set them for pytest
        interrupt = signum == signal.SIGINT
        signal.signal(signum, signal.default_int_handler if interrupt else signal.SIG_DFL)
    for number, path in streams.items():
        opened = os.open(path, os.O_CREAT | os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    for kind, size in (limits or {}).items():
        resource.setrlimit(kind, (size, size))


def _enter(arguments, env, streams, limits, plants):
    """Turn this forked process into the command."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    _prepare(streams, limits)
    for marker, plant in plants.items():
        plant.set(marker)
    sys.argv = arguments
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    if is_file(arguments[0]):
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def running(parent=None, session=None):
    """The pids of the processes of this parent or session, zombies left out."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid, _, sid, *_ = path.read_text().rsplit(")", 1)[1].split()
            if state != "Z" and (int(ppid) == parent or int(sid) == session):
                pids.append(int(path.parent.name))
    return pids


def listens(pid):
    """Whether the loop of a command runs: it catches SIGHUP, as Python does not by itself. False
    when it has ended."""
    try:
        with open(f"/proc/{pid}/status") as f:
            caught = next(int(line.split()[1], 16) for line in f if line.startswith("SigCgt"))
        return bool(caught >> (signal.SIGHUP - 1) & 1)
    except (OSError, StopIteration):
        return False
