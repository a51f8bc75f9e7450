"""bench.py: its tables and files from small models and shapes, its refusals, its exit codes."""
import itertools
import json

import pytest
from torch import nn

import bench
from mixer.bench import measure, unit
from mixer.experiments import Row
from mixer.report.measurements import measured_text
from mixer.runtime.device import has_native_bf16
from mixer.runtime.errors import InputError
from tests.helpers.networks import IMAGE_SIZE, TINY
from tests.helpers.tables import RESULTS, cells, headings

SMALL = ["--device", "cpu", "--repeats", "3"]
SMALL_MODELS = [*SMALL, "--image-size", str(IMAGE_SIZE), "--batch-size", "2"]


@pytest.fixture
def small(monkeypatch):
    """Two small units and two small models, all in this process, nothing compiled in C++."""
    monkeypatch.setattr(bench, "ROWS", [Row("ConvMixer 24", "convmixer", options=TINY),
                                        Row("ViT 24 Linear", "vit_linear", options=TINY)])
    monkeypatch.setattr(unit, "SHAPES", {"cpu": [(2, 4, 8, 9), (2, 4, 6, 3)]})
    monkeypatch.setattr(unit, "GRID", [(2, 4, 8, 9), (2, 4, 6, 3)])
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)
    for module in (unit, measure):
        monkeypatch.setattr(module, "in_fresh_process", lambda f, *args: (f(*args), None))
    mib = itertools.count(1)
    monkeypatch.setattr(measure, "peak_memory_mib", lambda device: next(mib))
    monkeypatch.setattr(unit, "find_spec", lambda name: None)  # timm's large model


def test_the_models_table_and_its_files(small, pictures, tmp_path, capsys):
    bench.main([*SMALL_MODELS, "--peers", "--data", str(pictures), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "bench.json").read_text())
    text = (tmp_path / "bench.md").read_text()
    assert text == measured_text(result) and text in capsys.readouterr().out
    assert headings(text) == headings((RESULTS / "bench-cpu/bench.md").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "bench.md"}
    assert not any(str(folder) in json.dumps(result) for folder in (tmp_path, pictures))
    assert result["config"]["amp"] == ("bf16" if has_native_bf16() else "off")
    assert [row["row"] for row in result["models"]] == ["ConvMixer 24", "ViT 24 Linear"]
    assert [(row["row"], row["candidate"]) for row in result["peers"]] == [
        ("ConvMixer 24", name) for name in ("ours", "timm", "timm, compiled", "timm, plain fp32")]
    for row in result["models"] + result["peers"]:
        assert row["training_images_per_s"] == pytest.approx(2000 / row["training_ms"])
        assert row["training_p20"] <= row["training_ms"] <= row["training_p80"]
        assert row["parameters"] > 0


def test_a_model_that_is_not_among_the_rows(small, tmp_path, capsys):
    options = ["--patch", "4", "--dim", "8", "--depth", "2", "--kernel-size", "3"]
    bench.main([*SMALL_MODELS, "--arch", "convmixer", *options, "--peers", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "bench.json").read_text())
    (ours,), (_, peer, *_) = result["models"], result["peers"]
    assert ours["row"] == peer["row"] == "convmixer patch 4 dim 8 depth 2 kernel_size 3"
    for key in ("parameters", "gflop_per_image"):
        assert ours[key] == peer[key] > 0
    assert cells(capsys.readouterr().out, "convmixer patch 4")[0][2:]


def test_several_image_sizes_one_of_which_fails(small, tmp_path, monkeypatch, capsys):
    """It stays in the table, with its reason, and the exit code tells."""
    def one_fails(f, models, workload, *args):
        if workload.image_size == 48 and "vit_linear" in str(models):
            return None, "out of memory: all of it"
        return f(models, workload, *args), None
    monkeypatch.setattr(measure, "in_fresh_process", one_fails)
    with pytest.raises(RuntimeError, match="1 of the measurements failed"):  # exit code 1
        bench.main([*SMALL, "--batch-size", "2", "--image-size", "32,48", "--out", str(tmp_path)])
    models = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert [(row["image_size"], row["row"], row.get("failed")) for row in models] == [
        (32, "ConvMixer 24", None), (32, "ViT 24 Linear", None), (48, "ConvMixer 24", None),
        (48, "ViT 24 Linear", "out of memory: all of it")]
    lines = cells(capsys.readouterr().out, "ViT 24 Linear")[:2]
    assert [line[0] for line in lines] == ["ViT 24 Linear, 32 px", "ViT 24 Linear, 48 px"]
    assert lines[1][1] == "out of memory"


@pytest.mark.faults
def test_a_batch_that_no_memory_holds_fails_in_its_own_process(capsys):
    with pytest.raises(RuntimeError, match="failed"):
        bench.main([*SMALL, "--rows", "convmixer-p24", "--batch-size", "100000000"])
    assert "batch_size 100000000; failed out of memory" in " ".join(capsys.readouterr().out.split())


def test_the_kernels_table_and_its_files(small, tmp_path, capsys):
    bench.main([*SMALL, "--kernels-table", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "kernels.json").read_text())
    text = (tmp_path / "kernels.md").read_text()
    assert text == measured_text(result) and text in capsys.readouterr().out
    assert headings(text) == headings((RESULTS / "kernels-cpu/kernels.md").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    assert len(result["blocks"]) == 2 * 2 * 4 and len(result["shapes"]) == 2 * 4
    assert {row["candidate"] for row in result["shapes"]} == {"fused"}
    assert [(row["row"], row["candidate"]) for row in result["steps"]] == [
        ("ConvMixer 24", name) for name in ("eager", "compile", "fused")]


@pytest.mark.parametrize("arguments, message", [
    (["--rows", "convmixer-24"], "choose from resnet18, "),
    (["--image-size", "192,200"], "ViT 24 Linear at --image-size 200: patch 24"),
    (["--arch", "resnet18", "--patch", "16"], "resnet18 has no patch"),
    (["--patch", "16"], "--patch needs --arch"), (["--data", "nowhere"], "nowhere does not exist"),
    (["--arch", "resnet18", "--rows", "resnet18"], "--rows would have no effect"),
    (["--kernels-table", "--compile", "--peers"], "--peers, --compile would have no effect"),
    (["--batch-size", "1"], "--batch-size must be in [2, inf)"),
    (["--image-size", "-1"], "--image-size must be in [1, inf)"),
    (["--device", "cpu", "--out", __file__], "cannot write to")])
def test_refusals_come_before_anything_is_measured(arguments, message):
    with pytest.raises(InputError) as e:
        bench.main(arguments)
    assert message in str(e.value)
