"""bench.py: its rows from small shapes, its table, what it refuses."""
import json

import pytest
import torch
from torch import nn

import bench

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Two small blocks and one small model, nothing compiled in C++ and no process of its own."""
    monkeypatch.setattr(bench, "SHAPES", {"cpu": [(2, 4, 8, 9), (2, 4, 6, 3)]})
    monkeypatch.setattr(bench, "MODELS", {"small": dict(dim=8, depth=1, patch=24)})
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)
    monkeypatch.setattr(bench, "in_fresh_process", lambda f, *args: 1.0)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)


def test_the_table_and_its_files(small, tmp_path, capsys):
    bench.main(["--kernels-table", "--device", "cpu", "--rounds", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.md").read_text() in printed
    assert len(result["blocks"]) == 2 * 2 * 5 and len(result["convs"]) == 1 and [r["model"] for r in result["steps"]] == ["small"]
    fused = next(r for r in result["blocks"] if r["way"] == "fused" and r["mode"] == "forward + backward")
    eager = next(r for r in result["blocks"] if r["way"] == "eager")
    activation = 4 * 8 * 8 * 4
    assert fused["gb_s"] == pytest.approx(5 * 2 * activation / fused["ms"] / 1e6)
    assert eager["faster_than_eager"] == 1.0 and fused["p20"] <= fused["ms"] <= fused["p80"]
    # PyTorch saves the statistics beside the activations, we the same: two numbers a channel
    assert eager["saved_bytes_per_sample"] == pytest.approx(3 * activation, abs=64)
    assert fused["saved_bytes_per_sample"] == pytest.approx(activation, abs=64)
    for line in (result["environment"]["device"], "| 2, 4, 8x8, 9 | forward + backward |", "| small, 32, 192 |", "times as fast"):
        assert line in printed


def test_refusals():
    for arguments, message in (([], "nothing to measure"), (["--kernels-table", "--rounds", "2"], "at least 3"),
                               (["--kernel-table"], "did you mean --kernels-table")):
        with pytest.raises(bench.InputError, match=message):
            bench.main(arguments)
