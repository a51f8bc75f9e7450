"""bench.py: its tables and files from small models and shapes, its refusals, its exit codes."""
import importlib.util
import json

import pytest
from PIL import Image
from torch import nn

import bench
from mixer.bench import block, measure, rows, timing
from mixer.experiments import Row
from mixer.report.measurements import bench_text, kernels_text
from mixer.runtime.device import has_native_bf16
from mixer.runtime.errors import InputError
from tests.helpers.networks import IMAGE_SIZE, TINY
from tests.helpers.tables import RESULTS, cells

SMALL = ["--device", "cpu", "--repeats", "3"]
SMALL_MODELS = [*SMALL, "--image-size", str(IMAGE_SIZE), "--batch-size", "2"]


@pytest.fixture
def small(monkeypatch):
    """Two small blocks and two small models, all in this process, nothing compiled in C++."""
    monkeypatch.setattr(bench, "ROWS", [Row("ConvMixer 24", "convmixer", options=TINY),
                                        Row("ViT 24 Linear", "vit_linear", options=TINY)])
    monkeypatch.setattr(block, "SHAPES", {"cpu": [(2, 4, 8, 9), (2, 4, 6, 3)]})
    monkeypatch.setattr(block, "GRID", [(2, 4, 8, 9), (2, 4, 6, 3)])
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)
    for module in (block, measure, rows):
        monkeypatch.setattr(module, "attempt", lambda f, *args: (f(*args), None))
    monkeypatch.setattr(timing, "COPY_FLOATS", 2**10)
    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 16})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def assert_keys_are_in(committed, result):
    """Those of the first row in each list, so that its table reads the committed ones too."""
    committed = json.loads((RESULTS / committed).read_text())
    assert set(result) <= set(committed)
    for name, contents in result.items():
        if isinstance(contents, list) and contents:
            assert set(contents[0]) <= set(committed[name][0]), name


def test_the_models_table_and_its_files(small, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (30, 30)).save(images / f"{('cat', 'dog')[i % 2]}.{i}.jpg")
    bench.main([*SMALL_MODELS, "--peers", "--data", str(images), "--out", str(out)])
    printed = capsys.readouterr()
    result = json.loads((out / "bench.json").read_text())
    assert (out / "bench.md").read_text() == bench_text(result)
    assert bench_text(result) in printed.out
    assert_keys_are_in("bench-cpu/bench.json", result)
    assert {p.name for p in out.iterdir()} == {
        "bench.json", "bench.md", "models.csv", "peers.csv", "data.csv"}
    assert [row["row"] for row in result["models"]] == ["ConvMixer 24", "ViT 24 Linear"]
    assert result["peers"] == [] and "needs timm (pip install timm)" in printed.err
    assert str(tmp_path) not in json.dumps(result)
    assert result["config"]["amp"] == ("bf16" if has_native_bf16() else "off")
    for row in result["models"]:
        assert row["training_images_per_s"] == pytest.approx(2000 / row["training_ms"])
        assert row["training_p20"] <= row["training_ms"] <= row["training_p80"]
        assert row["parameters"] > 0
    header, first, _ = (out / "models.csv").read_text().splitlines()
    assert header.startswith("row,image_size,batch_size,parameters,")
    assert first.startswith(f"ConvMixer 24,{IMAGE_SIZE},2,")


def test_several_image_sizes_one_of_which_fails(small, tmp_path, monkeypatch, capsys):
    """It stays in the table, with its reason, and the exit code tells."""
    def one_fails(f, make, load, *args):
        if load.image_size == 64 and make.args[0].arch == "vit_linear":
            return None, "out of memory: all of it"
        return f(make, load, *args), None
    monkeypatch.setattr(rows, "attempt", one_fails)
    sizes = [*SMALL, "--batch-size", "2", "--image-size", "32,48,64"]
    with pytest.raises(RuntimeError, match="1 of the measurements failed"):  # exit code 1
        bench.main([*sizes, "--out", str(tmp_path)])
    result, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert (tmp_path / "bench.md").read_text() == bench_text(result)
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "bench.md", "models.csv"}
    assert result["config"]["image_size"] == [32, 48, 64]
    *done, failed = result["models"]
    assert [(row["image_size"], row["row"]) for row in result["models"]] == [
        (side, row) for side in (32, 48, 64) for row in ("ConvMixer 24", "ViT 24 Linear")]
    assert failed == {"row": "ViT 24 Linear", "image_size": 64, "batch_size": 2,
                      "failed": "out of memory: all of it"}
    assert all(row["training_ms"] > 0 for row in done)
    lines = cells(printed, "ViT 24 Linear")[:3]
    assert [line[0] for line in lines] == [f"ViT 24 Linear, {side} px" for side in (32, 48, 64)]
    assert lines[2][1] == "out of memory"
    assert "ViT 24 Linear, 64 px, batch 2: out of memory: all of it" in printed
    csv = (tmp_path / "models.csv").read_text().splitlines()
    assert csv[6].endswith(",out of memory: all of it")


@pytest.mark.faults
def test_a_batch_that_no_memory_holds_fails_in_its_own_process(capsys):
    with pytest.raises(RuntimeError, match="failed"):
        bench.main([*SMALL, "--rows", "convmixer-p24", "--batch-size", "100000000"])
    assert "ConvMixer 24, batch 100000000: out of memory" in capsys.readouterr().out


def test_the_kernels_table_and_its_files(small, tmp_path, capsys):
    bench.main([*SMALL, "--kernels-table", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.md").read_text() == kernels_text(result)
    assert kernels_text(result) in printed
    assert_keys_are_in("kernels-cpu/kernels.json", result)
    assert {p.name for p in tmp_path.iterdir()} == {
        "kernels.json", "kernels.md", "blocks.csv", "shapes.csv", "steps.csv"}
    assert len(result["blocks"]) == 2 * 2 * 5 and len(result["shapes"]) == 2 * 4
    assert [(row["model"], row["way"]) for row in result["steps"]] == [
        ("ConvMixer 24", way) for way in ("eager", "compile", "fused")]


@pytest.mark.parametrize("arguments, messages", [
    (["--rows", "convmixer-24"], ["choose from resnet18, ", "(did you mean convmixer-p24?)"]),
    (["--image-size", "100"], ["does not suit vit_linear-p24", "does not suit convmixer-p16"]),
    (["--image-size", "192,200"], ["--image-size 200 does not suit vit_linear-p24: patch 24",
                                   "--image-size 200 does not suit convmixer-p16"]),
    (["--image-size", "192,288", "--peers", "--data", "x"],
     ["--peers does not go with several sizes", "--data does not go with several sizes"]),
    (["--kernels-table", "--peers", "--rows", "resnet18"],
     ["--peers does not go with --kernels-table", "--rows does not go with --kernels-table"]),
    (["--batch-size", "1"], ["--batch-size must be at least 2"]),
    (["--image-size", "-1"], ["--image-size must be at least 1"]),
    (["--device", "cpu", "--amp", "fp16"], ["no fp16 training on the CPU"]),
    (["--data", "nowhere"], ["nowhere does not exist"]),
    (["--device", "cpu", "--out", __file__], ["cannot write to"]),
])
def test_refusals_come_before_anything_is_measured(arguments, messages):
    with pytest.raises(InputError) as e:
        bench.main(arguments)
    for message in messages:
        assert message in str(e.value)
