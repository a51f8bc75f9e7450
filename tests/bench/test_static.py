"""The estimates from machine code: the committed ones still hold, and how they are counted."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mixer.bench import static
from mixer.bench.block import SHAPES
from mixer.report.measurements import LaunchEstimate
from mixer.report.tables import static_text
from tests.helpers.tables import RESULTS

triton = pytest.importorskip("triton", reason="Triton is not installed")
COMMITTED = json.loads((RESULTS / "kernels-static" / "static.json").read_text())
LAUNCHES = [LaunchEstimate.from_row(row) for row in COMMITTED["launches"]]
ESTIMATE = """
import json, sys
from mixer.bench.static import estimate_launches
for m in estimate_launches(tuple(map(int, sys.argv[1].split(","))), 90):
    print(json.dumps(m.as_row()))
"""


@pytest.mark.faults
@pytest.mark.skipif(triton.__version__ != COMMITTED["environment"]["triton"],
                    reason="the committed figures are of another Triton")
@pytest.mark.parametrize("shape", SHAPES["cuda"][:2], ids=str)
def test_the_kernels_are_as_short_as_committed(shape, tmp_path):
    """Within 5 %. If they are shorter, run `python bench.py --kernels-static --out
    results/kernels-static`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", ESTIMATE, ",".join(map(str, shape))],
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [LaunchEstimate.from_row(json.loads(line)) for line in result.stdout.splitlines()]
    committed = [m for m in LAUNCHES if tuple(m.shape) == shape and m.capability == 90]
    assert [m.kernel for m in found] == [m.kernel for m in committed]
    for now, before in zip(found, committed, strict=True):
        assert now.spilled_bytes <= before.spilled_bytes
        assert now.instructions.instructions == pytest.approx(
            before.instructions.instructions, rel=0.05), now.kernel


def test_the_committed_figures():
    """Nothing spills; a layer is at most 60 and 140 us on an H200. Two programs on each SM, but for
    forward passes on other GPUs and windows of 512 elements on an A100.
    """
    assert not [m for m in LAUNCHES if m.failed or m.spilled_bytes]
    assert {m.capability for m in LAUNCHES} == set(static.GPUS)
    hopper = [m for m in LAUNCHES if m.capability == 90]
    originals = SHAPES["cuda"][:2]
    long_windows = 80, (64, 1536, 32, 9)
    assert all(m.programs_per_sm >= 2 for m in LAUNCHES
               if m.capability == 90 or tuple(m.shape) in originals
               or "backward" in m.kernel and (m.capability, tuple(m.shape)) != long_windows)
    for shape, limit in zip(originals, (60, 140), strict=True):
        assert sum(m.estimate_us for m in hopper if tuple(m.shape) == shape) <= limit
    assert all(m.estimate_us >= m.floor_us for m in hopper)
    assert static_text(COMMITTED) == (RESULTS / "kernels-static" / "static.md").read_text()


def test_the_instructions_of_loops_count_with_their_iterations(monkeypatch):
    """Two loops, of blocks of tiles and of elements, between straight lines."""
    line = {name: first for name, first, _ in static.python_loops()}
    block, first = ((("depthwise_triton.py", line[name]),) for name in ("block", "first"))
    code = [("MOV", ()), *[("FFMA", block)] * 20, ("BAR", block), *[("MUFU", first)] * 20,
            ("EXIT", ())]
    monkeypatch.setattr(static, "disassembled", lambda cubin: (
        code, [(1, 21), (3, 5), (22, 41)]))  # the second one waits
    plan = SimpleNamespace(H=8, W=8, K=9, BLOCK_M=64, BLOCK_T=1, BLOCK_OUT=32, TILES=2)
    counts, waits = static.executed(b"", plan, 250)
    assert counts == {"MOV": 1, "FFMA": 8 * 20, "BAR": 8, "MUFU": 8 * 20, "EXIT": 1}
    assert waits == static.START_CYCLES + 8 * static.DRAM_CYCLES + 8 * static.L2_CYCLES


@pytest.mark.parametrize("opcode, name", [
    ("FFMA", "float"), ("MUFU", "special"), ("IMAD", "integer"), ("LDGSTS", "memory"),
    ("SHFL", "shuffle"), ("HGMMA", "tensor"), ("F2FP", "convert"), ("BAR", "sync")])
def test_classes(opcode, name):
    assert static.class_of(opcode) == name
