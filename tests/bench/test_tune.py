"""Tuning, with fake timers and Triton's interpreter in place of a GPU."""
import json
from types import SimpleNamespace

import pytest
import torch

from mixer.bench import tune
from mixer.bench.timing import Times
from mixer.report.tables import fastest_tiles, tune_text
from tests.helpers.blocks import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from kernels import depthwise_check, depthwise_launch, depthwise_triton

SWITCHED = isinstance(depthwise_triton._gelu, triton.runtime.interpreter.InterpretedFunction)
SHAPE = (3, 2, 4, 3)
KNOBS = [{}, dict(BLOCK_M=16), dict(BLOCK_M=32), dict(num_warps=1), dict(num_warps=2)]
ENVIRONMENT = {"device": "a GPU", "date": "2026-01-01", "torch": "2", "triton": "3"}


@pytest.fixture
def tiles(monkeypatch):
    """Of one small shape: the second candidate does not compile, the third is twice as fast, and
    the last result of the fifth is NaN."""
    monkeypatch.setattr(tune, "candidates", lambda side: KNOBS)
    monkeypatch.setattr(tune, "estimated_ms", lambda *args: 0.5)
    monkeypatch.setattr(depthwise_check, "fails", lambda case: (
        "the compiler dies of SIGSEGV" if case.knobs == KNOBS[1] else None))
    for mode in tune.MODES:
        right = getattr(tune.Call, mode)

        def run(self, knobs, right=right):
            *results, last = right(self, knobs)
            return *results, last * float("nan") if knobs == KNOBS[4] else last
        monkeypatch.setattr(tune.Call, mode, run)

    def race(ways, repeats, device):
        for way in ways.values():
            way()
        ms = {i: 1.0 if i == 2 else 2.0 for i in ways}
        return ({i: Times(t, t, t) for i, t in ms.items()}, {i: t / 2 for i, t in ms.items()})
    return tune.tune_shape(SHAPE, 3, torch.device(DEVICE), race)


@pytest.mark.skipif(DEVICE == "cpu" and not SWITCHED, reason="without a GPU, TRITON_INTERPRET=1 "
                                                             "must precede the import of Triton")
def test_the_fastest_tiles_and_the_table(tiles):
    result = {"environment": ENVIRONMENT, "tiles": json.loads(json.dumps(
        [m.as_row() for m in tiles]))}
    assert [m.mode for m in tiles] == ["forward"] * 5 + ["backward"] * 5
    assert [m.failed is None for m in tiles] == [True, False, True, True, False] * 2
    table = fastest_tiles(result)
    name = depthwise_launch.tile_name(4, 4, 3, torch.float16, True)
    assert table["a GPU"]["tiles"][name] == KNOBS[2] and len(table["a GPU"]["tiles"]) == 2
    text = tune_text(result)
    assert "BLOCK_M=32" in text and "2.00x" in text and "dies of SIGSEGV" in text and "nan" in text


def test_a_launch_takes_the_tile_that_was_timed_on_its_gpu(monkeypatch):
    name = depthwise_launch.tile_name(8, 8, 9, torch.float16, False)
    monkeypatch.setattr(depthwise_launch, "tuned", lambda: {
        "a GPU": {"tiles": {name: dict(BLOCK_M=64, num_warps=4)}}})

    def block_m(gpu, backward=False):
        device = depthwise_launch.ANY_DEVICE._replace(name=gpu)
        return depthwise_launch.launch(
            (250, 512, 8, 8), 9, torch.float16, backward, device=device).plan.BLOCK_M
    assert block_m("a GPU") == 64 != block_m("another GPU")
    assert block_m("a GPU", backward=True) == block_m("another GPU", backward=True)


def test_no_shape_is_started_after_the_time_is_over(monkeypatch):
    monkeypatch.setattr(tune, "TESTS", SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(tune, "tune_shape", lambda shape, repeats, device: [
        tune.TileMeasurement(shape, "forward", {}, ms=1.0)])
    now = iter([0.0, 1.0, tune.SECONDS - 1.0, *[tune.SECONDS + 1.0] * 10])
    tiles = tune.tune_kernels(SimpleNamespace(repeats=3), [], torch.device("cuda"),
                              clock=lambda: next(now))["tiles"]
    assert [m.failed is None for m in tiles] == [True, True, *[False] * (len(tiles) - 2)]
    with pytest.raises(tune.InputError, match="needs a GPU"):
        tune.tune_kernels(SimpleNamespace(repeats=3), [], torch.device("cpu"))
