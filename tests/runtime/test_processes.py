import os
import signal

import pytest
import torch

from mixer.runtime.processes import attempt, in_one_line


class Unsendable(Exception):
    """Cannot be made from its message alone, so that no other process can unpickle it."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def fail():
    raise Unsendable("one", "other")


@pytest.mark.faults
@pytest.mark.parametrize("f, args, result, failure", [
    (divmod, (7, 2), (3, 1), None),
    (int, ("x",), None, "ValueError: invalid literal for int() with base 10: 'x'"),
    (fail, (), None, "Unsendable: one and other"),
    (signal.raise_signal, (signal.SIGKILL,), None, "its process was killed (out of memory?)"),
    (signal.raise_signal, (signal.SIGSEGV,), None, "its process was killed (out of memory?)"),
], ids=["result", "error", "unsendable", "SIGKILL", "SIGSEGV"])
def test_an_attempt_is_a_result_or_a_reason(f, args, result, failure):
    assert attempt(f, *args) == (result, failure)


@pytest.mark.faults
def test_an_attempt_runs_in_another_process_and_shows_its_traceback_on_demand(capfd):
    assert attempt(os.getpid)[0] != os.getpid()
    attempt(int, "x", debug=True)
    err = capfd.readouterr().err
    assert "Traceback" in err and "invalid literal" in err


def test_memory_that_ran_out_reads_the_same_everywhere():
    for e in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert in_one_line(e).startswith("out of memory: ") and "\n" not in in_one_line(e)
    assert in_one_line(KeyError("a")) == "KeyError: 'a'"
