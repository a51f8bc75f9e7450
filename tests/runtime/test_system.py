import builtins
import io
import os
import platform
import resource

import pytest
import torch

from mixer.runtime import system
from mixer.runtime.cli import run
from mixer.runtime.processes import in_fresh_process


@pytest.mark.parametrize("cpu_max, cores", [("max 100000", 8), ("250000 100000", 2),
                                            ("50000 100000", 1), (None, 8)])
def test_cores_respect_the_quota_of_a_container(monkeypatch, cpu_max, cores):
    def opened(path, *args):
        if path != "/sys/fs/cgroup/cpu.max":
            return real_open(path, *args)
        if cpu_max is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpu_max)
    real_open = builtins.open
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(builtins, "open", opened)
    assert system.cores() == cores


def page_faults():
    """Of twenty tensors of 64 MiB, one after another."""
    before = None
    for _ in range(22):
        torch.ones(2**24)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        before = before or now
    return now - before


@system.freed_memory_kept()  # as the functions that bench.py runs in fresh processes
def page_faults_in_bench():
    return page_faults()


def page_faults_of_a_command():
    def main(argv):
        faults.append(page_faults())
    faults = []
    with pytest.raises(SystemExit):
        run(main, [])
    return faults[0]


@pytest.mark.faults
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_commands_keep_what_they_free():
    """Without it each tensor has its pages mapped again: 16,384 of 4 KiB, twenty-one times. With
    it, the first few tensors may lie in different places."""
    few, many = 5 * 16_384, 15 * 16_384
    assert in_fresh_process(page_faults) > many
    assert in_fresh_process(page_faults_in_bench) <= few
    assert in_fresh_process(page_faults_of_a_command) <= few
