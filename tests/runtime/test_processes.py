import os
import signal
import sys
import time

import pytest
import torch

from mixer.runtime import processes
from mixer.runtime.processes import STOPPING, Stop, error_line, in_fresh_process


class Unsendable(Exception):
    """Cannot be made from its message alone, so that no other process can unpickle it."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def fail():
    raise Unsendable("one", "other")


@pytest.mark.faults
@pytest.mark.parametrize("f, args, result, failure", [
    (divmod, (7, 2), (3, 1), None),
    (fail, (), None, "Unsendable: one and other"),
    (signal.raise_signal, (signal.SIGKILL,), None, "its process was killed (out of memory?)"),
], ids=["result", "error", "SIGKILL"])
def test_an_attempt_is_a_result_or_a_reason(f, args, result, failure):
    assert in_fresh_process(f, *args) == (result, failure)


def test_without_a_process_an_attempt_fails_and_blames_no_disk(monkeypatch):
    """As where `ulimit -u` is reached, or a container has no more pids."""
    def start(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(processes.SPAWN.Process, "start", start)
    assert in_fresh_process(divmod, 7, 2) == (
        None, "BlockingIOError: [Errno 11] Resource temporarily unavailable")


def test_memory_that_ran_out_reads_the_same_everywhere():
    for e in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert error_line(e).startswith("out of memory: ") and "\n" not in error_line(e)
    assert error_line(KeyError("a")) == "KeyError: 'a'"


# signals

@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As nohup, or a shell's &, would have it for pytest."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOPPING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", STOPPING, ids=lambda signum: signum.name)
def test_the_first_signal_is_kept_for_the_loop(signum):
    before = [signal.getsignal(each) for each in STOPPING]
    with Stop() as stop:
        assert stop.signum == 0
        signal.raise_signal(signum)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signum
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_signal_that_the_parent_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signum == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(first, monkeypatch):
    """`timeout` and a terminal that closes send a signal twice: these still let the run save."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with Stop() as stop:
        signal.raise_signal(first)
        for again in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(again)
            assert stop.signum == first
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)


def test_a_command_has_an_exit_code_and_gets_the_signals():
    with Stop() as stop:
        assert stop.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        assert stop.run(["sh", "-c", "kill -9 $$"]) == 137
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            assert stop.run(["sleep", "300"]) == 143 and stop.signum == signal.SIGTERM
        finally:
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start < 200, "it was stopped"
        assert stop.run(["sleep", "300"]) == 143, "a signal that came before it"
