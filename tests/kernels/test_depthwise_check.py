"""What precedes the first use of the Triton kernels: they are compiled elsewhere, then compared."""
import pytest
import torch

from tests.helpers.blocks import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from kernels import depthwise_check, depthwise_launch, depthwise_triton
from kernels.depthwise_check import Case, disagreement, fails
from kernels.depthwise_launch import ANY_DEVICE, Device

SWITCHED = isinstance(depthwise_triton._gelu, triton.runtime.interpreter.InterpretedFunction)
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not SWITCHED, reason="without a GPU, "
                                  "TRITON_INTERPRET=1 must precede the import of Triton")
CASE = Case((3, 2, 8, 8), 3, "float16", ANY_DEVICE)


def self_check():
    return depthwise_check.self_check(torch.device(DEVICE))


@runs_kernels
def test_the_self_check_passes():
    assert self_check() is None


@runs_kernels
def test_the_self_check_sees_a_nan(monkeypatch):
    backward = depthwise_launch.backward
    monkeypatch.setattr(depthwise_launch, "backward", lambda *args, **options: [
        t * float("nan") for t in backward(*args, **options)])
    assert "wrong on this GPU" in self_check()


@pytest.mark.parametrize("wrong", (0, 1))
@pytest.mark.parametrize("factor", (2, float("nan")))
def test_one_wrong_tensor_among_right_ones_is_seen(wrong, factor):
    y = torch.ones(3)
    assert disagreement([y, y], [y, y]) is None
    assert "relative errors" in disagreement([y * factor if i == wrong else y for i in range(2)],
                                             [y, y])


@runs_kernels
def test_the_self_check_sees_the_kernels_of_two_launches(monkeypatch):
    merge = depthwise_launch.merge_moments
    monkeypatch.setattr(depthwise_launch, "merge_moments",
                        lambda mean, *rest: merge(mean + 1, *rest))
    assert "wrong on this GPU" in self_check()


@runs_kernels
def test_the_self_check_reports_a_kernel_that_fails(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of resource\nsecond line")
    monkeypatch.setattr(depthwise_launch, "forward", fail)
    assert self_check() == ("the Triton kernels fail on this GPU: RuntimeError: out of resource")


@pytest.mark.faults
def test_shared_memory_that_a_gpu_lacks_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert fails(CASE) is None
    small = CASE._replace(device=Device(90, 1000))
    assert "bytes of shared memory and this GPU has 1,000" in fails(small)


@pytest.mark.faults
@pytest.mark.parametrize("fault, reason", [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the compiler dies of SIGSEGV"),
    ("raise RuntimeError('no ptxas')", "compiling fails: RuntimeError: no ptxas")])
def test_a_compiler_that_dies_or_raises_is_a_reason(tmp_path, monkeypatch, fault, reason):
    (tmp_path / "triton.py").write_text(fault)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fails(CASE) == reason


def test_what_triton_compiles_alike_is_tried_once(monkeypatch):
    """From a stand-in for a GPU and its tensors, since there may be none."""
    tried = []
    monkeypatch.setattr(depthwise_check, "fails", tried.append)
    monkeypatch.setattr(depthwise_check, "_failures", {})
    for N, H in ((250, 8), (250, 8), (250, 12), (234, 8), (240, 8), (1, 8)):
        depthwise_check.fails_here(torch.empty(N, 512, H, 8, dtype=torch.float16), 9)
    assert [case.shape[::2] for case in tried] == [(250, 8), (250, 12), (240, 8), (1, 8)]
    assert tried[0].dtype == "float16" and tried[0].device == ANY_DEVICE
