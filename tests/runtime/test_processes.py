import os

import pytest
import torch

from mixer.runtime.processes import ChildFailed, in_fresh_process, in_one_line


def test_a_fresh_process_answers_fails_or_dies():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ChildFailed, match="^ValueError: invalid literal") as e:
        in_fresh_process(int, "x")
    assert "Traceback" in e.value.trace
    with pytest.raises(ChildFailed, match=r"exit code -9 \(killed: out of memory\?\)"):
        in_fresh_process(kill_self)


def kill_self():
    os.kill(os.getpid(), 9)


def test_memory_that_ran_out_reads_the_same_everywhere():
    for e in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert in_one_line(e).startswith("out of memory: ") and "\n" not in in_one_line(e)
    assert in_one_line(KeyError("a")) == "KeyError: 'a'"
