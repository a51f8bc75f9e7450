import pytest
import torch

from mixer.data.batches import fits_on
from mixer.runtime.device import describe_amp, environment, pick_amp, pick_device, sum_dtype
from mixer.runtime.errors import InputError

CPU = torch.device("cpu")


def test_devices_and_dtypes_that_are_not_there():
    with pytest.raises(InputError, match="--device cuda:9: no such device; choose from cpu"):
        pick_device("cuda:9")
    with pytest.raises(InputError, match="no fp16 training on the CPU"):
        pick_amp("fp16", CPU)
    assert pick_amp("auto", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bf16_is_the_default_where_the_cpu_has_it(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: False, "avx2": True})
    assert pick_amp("auto", CPU) is None
    assert describe_amp("auto", CPU) == "fp32 (this CPU has no bf16 products)"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert pick_amp("auto", CPU) is torch.bfloat16 and pick_amp("off", CPU) is None
    assert describe_amp("auto", CPU) == "autocast to bfloat16 (this CPU has bf16 products)"
    assert describe_amp("off", CPU) == "fp32" and describe_amp("bf16", CPU) == (
        "autocast to bfloat16")


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == CPU
    with pytest.raises(InputError, match="cannot share a GPU"):
        pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="cuda:2: no such device; choose from cpu, cuda:0, cuda:1"):
        pick_device("auto")


def test_environment_names_what_a_number_was_measured_on():
    env = environment(CPU)
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert "threads" in env["device"] and env["cuda"] is None and len(env["date"]) == 10


def test_a_macs_gpu_is_taken_only_when_asked_for(monkeypatch):
    with pytest.raises(InputError, match="--device mps: no such device; choose from cpu"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = pick_device("mps")
    assert mps == torch.device("mps", 0) and pick_device("auto") == CPU
    assert pick_amp("auto", mps) is None and sum_dtype(mps) is torch.float32
    assert environment(mps)["device"].endswith(", mps")
    assert fits_on(mps, 10**15, "yes") and not fits_on(mps, 1, "auto")
    with pytest.raises(InputError, match="--amp bf16: not tried on mps; choose off"):
        pick_amp("bf16", mps)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device mps: no such device"):
        pick_device("mps")
