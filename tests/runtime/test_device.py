import builtins
import io
import os
import platform
import resource

import pytest
import torch

from mixer.runtime import device
from mixer.runtime.cli import run
from mixer.runtime.device import cores, dtype_name, environment, pick_amp, pick_device
from mixer.runtime.errors import InputError
from mixer.runtime.processes import in_fresh_process

CPU = torch.device("cpu")


def test_devices_and_dtypes_that_are_not_there():
    with pytest.raises(InputError, match="--device cuda:9: no such device; choose from cpu"):
        pick_device("cuda:9")
    assert pick_amp("auto", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bf16_is_the_default_where_the_cpu_has_it(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: False, "avx2": True})
    assert pick_amp("auto", CPU) is None and dtype_name(None) == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert pick_amp("auto", CPU) is torch.bfloat16 and pick_amp("off", CPU) is None
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="cuda:2: no such device; choose from cpu, cuda:0, cuda:1"):
        pick_device("auto")


def test_peak_memory_where_the_system_does_not_give_the_peak(monkeypatch):
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO("VmRSS: 1 kB\n"))
    assert 50 < device.peak_memory_mib(CPU) < 2**20


def test_environment_names_what_a_number_was_measured_on():
    env = environment(CPU)
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert "threads" in env["device"] and env["cuda"] is None and len(env["date"]) == 10


@pytest.mark.parametrize("cpu_max, count", [("max 100000", 8), ("250000 100000", 2),
                                            ("50000 100000", 1), (None, 8)])
def test_cores_respect_the_quota_of_a_container(monkeypatch, cpu_max, count):
    def opened(path, *args):
        if path != "/sys/fs/cgroup/cpu.max":
            return real_open(path, *args)
        if cpu_max is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpu_max)
    real_open = builtins.open
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(builtins, "open", opened)
    assert cores() == count


def page_faults():
    """Of twenty tensors of 64 MiB, one after another."""
    before = None
    for _ in range(22):
        torch.ones(2**24)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        before = before or now
    return now - before


def page_faults_of_a_command():
    faults = []
    with pytest.raises(SystemExit):
        run(lambda argv: faults.append(page_faults()), [])
    return faults[0]


@pytest.mark.faults
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_commands_keep_what_they_free():
    """Without it each tensor has its pages mapped again: 16,384 of 4 KiB, twenty-one times. With
    it, the first few tensors may lie in different places."""
    few, many = 5 * 16_384, 15 * 16_384
    assert in_fresh_process(page_faults)[0] > many
    assert in_fresh_process(page_faults_of_a_command)[0] <= few
