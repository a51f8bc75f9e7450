"""A Mac and Windows, simulated: without what Linux alone has."""
import builtins
import contextlib
import ctypes
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

import train as script
from mixer.runtime import files, processes, system
from mixer.runtime.cli import run
from tests.helpers.commands import ROOT, TINY


@pytest.fixture
def mac(monkeypatch):
    """No affinity, no /proc, no prctl, no posix_fallocate, and no limit of address space."""
    def open_without_proc(path, *args, **kwargs):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real_open(path, *args, **kwargs)

    def refuse(kind, limits):
        raise ValueError("current limit exceeds maximum limit")
    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", open_without_proc)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(resource, "setrlimit", refuse)


def test_a_run_on_a_mac(mac, pictures, tmp_path, capsys):
    script.main([*TINY, "--data", str(pictures), "--steps", "2", "--out", str(tmp_path / "run"),
                 "--cache", str(tmp_path)])
    assert "final val accuracy" in capsys.readouterr().out


def test_what_a_mac_does_not_tell(mac, monkeypatch):
    assert system.cores() == os.cpu_count() and system.cpu_name() is None
    assert system.set_death_signal(9) == 0
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert system.peak_resident_mib() == pytest.approx(mib, rel=0.1)
    monkeypatch.setattr(sys, "platform", "darwin")  # there, the unit is bytes
    assert system.peak_resident_mib() == pytest.approx(mib / 2**10, rel=0.1)

    def unknown(name):
        raise ValueError("unrecognized configuration name")
    monkeypatch.setattr(os, "sysconf", unknown)
    assert math.isnan(system.memory_mib())


def test_a_limit_of_memory_is_set_where_the_system_has_one():
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work():
        system.limit_memory(2**28)
        try:
            bytearray(2**29)
        except MemoryError:
            send.send("MemoryError")
    process = context.Process(target=work)
    process.start()
    process.join()
    assert receive.poll() and receive.recv() == "MemoryError"


def test_a_file_keeps_its_bytes_while_its_disk_space_is_taken(mac, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"header" * 1000)
    os.truncate(path, 3 * 2**20 + 5)
    before = path.read_bytes()
    files.reserve(path)
    assert path.read_bytes() == before and path.stat().st_blocks * 512 >= len(before)


WINDOWS = """
import multiprocessing.context, os, runpy, signal, sys
sys.modules.update(fcntl=None, resource=None)
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGCHLD", "pthread_sigmask"):
    delattr(signal, name)
for name in ("sched_getaffinity", "sysconf", "setsid", "getppid", "posix_fallocate"):
    delattr(os, name)
del multiprocessing.context._concrete_contexts["fork"]
multiprocessing.get_all_start_methods = lambda: ["spawn"]
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.faults
@pytest.mark.parametrize("command", ["train.py", "bench.py"])
def test_windows_is_refused_in_one_line_that_names_wsl(command):
    result = subprocess.run([sys.executable, "-c", WINDOWS, command], cwd=ROOT, text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.count("\n") == 1 and "WSL" in result.stderr, result.stderr


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
    with contextlib.suppress(SystemExit):
        run(main, [])
    return faults[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_commands_keep_what_they_free():
    """Without it each tensor has its pages mapped again: 16,384 of 4 KiB, twenty-one times. With
    it, the first few tensors may lie in different places."""
    few, many = 5 * 16_384, 15 * 16_384
    assert processes.in_fresh_process(page_faults) > many
    assert processes.in_fresh_process(page_faults_in_bench) <= few
    assert processes.in_fresh_process(page_faults_of_a_command) <= few
