import multiprocessing
import os
import signal
import sys
import threading
import time
import types

import pytest
import torch

from mixer.runtime import processes, signals
from mixer.runtime.errors import Interrupted
from mixer.runtime.processes import (
    TORCHRUN,
    ChildFailed,
    attempt,
    exit_code_of,
    in_fresh_process,
    in_one_line,
)
from tests.helpers.commands import FORK, ForkedChild, wait_until


@pytest.fixture
def quick(monkeypatch):
    """Processes are forked from this one, instead of importing torch for three seconds."""
    context = types.SimpleNamespace(Pipe=FORK.Pipe, Process=ForkedChild)
    monkeypatch.setattr(processes, "SPAWN", context)


def test_a_fresh_process_answers_fails_or_dies(quick):
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ChildFailed, match="^ValueError: invalid literal") as e:
        in_fresh_process(int, "x")
    assert "Traceback" in e.value.trace
    with pytest.raises(ChildFailed, match=r"exit code -9 \(killed: out of memory\?\)"):
        in_fresh_process(kill_self)


def kill_self():
    os.kill(os.getpid(), 9)


def test_an_attempt_is_a_result_or_a_reason(quick, capfd):
    message = "ValueError: invalid literal for int() with base 10: 'x'"
    assert attempt(int, "x", debug=True) == (None, message)
    assert "Traceback" in capfd.readouterr().err


def test_exit_codes_are_those_of_a_shell(quick):
    assert exit_code_of(sys.exit, 3) == 3 and exit_code_of(kill_self) == 137


def test_exit_codes_where_the_system_forgets_them(quick):
    """A parent that ignores SIGCHLD, or another part of the program that waits for processes."""
    assert in_fresh_process(forgotten_exit_codes) == [0, 3, 1, 1]


def forgotten_exit_codes():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return [exit_code_of(*args) for args in ((sys.exit, 0), (sys.exit, 3), (kill_self,),
                                             (int, "x"))]


@pytest.mark.faults
def test_the_child_of_a_worker_of_torchrun_is_not_one(monkeypatch):
    monkeypatch.setenv(TORCHRUN, "job")
    assert in_fresh_process(os.getenv, TORCHRUN) is None


def send_to_self(signum, condition):
    """Once condition() is true, send this process a signal."""
    def work():
        wait_until(condition)
        os.kill(os.getpid(), signum)
    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_process_may_save(quick, listening, tmp_path, signum):
    send_to_self(signum, (tmp_path / "started").exists)
    assert exit_code_of(save_when_stopped, tmp_path) == 128 + signum
    assert (tmp_path / "saved").exists() and signals.pending() == signum


def save_when_stopped(folder):
    with signals.deferred():
        (folder / "started").touch()
        while not signals.pending():
            time.sleep(0.01)
        (folder / "saved").touch()
        signals.check()


@pytest.mark.faults
def test_ctrl_c_while_the_fresh_process_imports(listening, capfd):
    """No traceback: the signal waits until the process listens."""
    send_to_self(signal.SIGINT, multiprocessing.active_children)
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        in_fresh_process(print, "never printed")
    assert capfd.readouterr() == ("", "") and not multiprocessing.active_children()


def test_memory_that_ran_out_reads_the_same_everywhere():
    for e in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert in_one_line(e).startswith("out of memory: ") and "\n" not in in_one_line(e)
    assert in_one_line(KeyError("a")) == "KeyError: 'a'"
