"""bench.py: its rows from small models and shapes, its files, what it refuses, how it ends."""
import importlib.util
import json
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

import bench
from mixer.bench import block, candidates, measure, rows
from mixer.runtime import processes
from mixer.experiments import ROWS, Row
from mixer.runtime.processes import ChildFailed
from mixer.report.tables import bench_text, kernels_text

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--repeats", "3"]


@pytest.fixture
def small(monkeypatch):
    """Two small blocks and one small model, nothing compiled in C++ and no process of its own."""
    options = dict(dim=8, depth=1, patch=12)
    monkeypatch.setattr(bench, "ROWS", [Row("ConvMixer 24", "convmixer", 2132, 11, options), Row("ViT 24 Linear", "vit_linear", 3604, 17, options)])
    monkeypatch.setattr(block, "SHAPES", {"cpu": [(2, 4, 8, 9), (2, 4, 6, 3)]})
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: self)
    monkeypatch.setattr(processes, "in_fresh_process", lambda f, *args: f(*args))
    monkeypatch.setattr(block, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_models_table_and_its_files(small, tmp_path, capsys):
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (30, 30)).save(tmp_path / "images" / f"{('cat', 'dog')[i % 2]}.{i}.jpg")
    out = tmp_path / "out"
    bench.main([*SMALL, "--image-size", "24", "--batch-size", "2", "--peers", "--data", str(tmp_path / "images"), "--out", str(out)])
    printed = capsys.readouterr()
    result = json.loads((out / "bench.json").read_text())
    assert (out / "bench.md").read_text() == bench_text(result) and bench_text(result) in printed.out
    assert {p.name for p in out.iterdir()} == {"bench.json", "bench.md", "models.csv", "memory.csv", "peers.csv", "data.csv", "speed.png", "memory.png"}
    assert [row["row"] for row in result["models"]] == ["ConvMixer 24", "ViT 24 Linear"] and result["peers"] == []
    assert "needs timm (pip install timm)" in printed.err
    assert str(tmp_path) not in json.dumps(result) and result["config"]["amp"] == "off"
    for row in result["models"]:
        assert row["training_images_per_s"] == pytest.approx(2000 / row["training_ms"])
        assert row["training_p20"] <= row["training_ms"] <= row["training_p80"] and row["parameters"] > 0
    header, first, _ = (out / "models.csv").read_text().splitlines()
    assert header.startswith("row,batch_size,parameters,") and first.startswith("ConvMixer 24,2,")
    for name in ("speed.png", "memory.png"):
        with Image.open(out / name) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 50  # points, not an empty page


def test_a_row_that_fails_stays_in_the_table_and_the_exit_code_tells(small, tmp_path, monkeypatch, capsys):
    def one_fails(f, make, *args):
        if "vit_linear" in make.args:
            raise ChildFailed("out of memory: all of it")
        return f(make, *args)
    monkeypatch.setattr(processes, "in_fresh_process", one_fails)
    with pytest.raises(RuntimeError, match="1 of the measurements failed"):  # exit code 1
        bench.main([*SMALL, "--image-size", "24", "--batch-size", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| ViT 24 Linear | out of memory |" in printed and "ViT 24 Linear, batch 2: out of memory: all of it" in printed
    written = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert written[1] == {"row": "ViT 24 Linear", "batch_size": 2, "failed": "out of memory: all of it"} and written[0]["training_ms"] > 0
    assert (tmp_path / "models.csv").read_text().splitlines()[2].endswith(",out of memory: all of it")


def test_rows_are_visited_in_turn_and_a_late_failure_counts(small, monkeypatch):
    visits = []

    def visit(f, make, load, repeats, batches):
        visits.append((make.args[0], repeats, batches))
        if len(visits) == 4:
            raise ChildFailed("out of memory: all of it")
        return f(make, load, repeats, batches)
    monkeypatch.setattr(processes, "in_fresh_process", visit)
    config = bench.read_config([*SMALL, "--repeats", "7", "--image-size", "24", "--batch-size", "8"])[0]
    load = measure.Load(8, 24, CPU, None)
    models, memory = rows.measure_rows(config, {arch: partial(candidates.build, arch, dict(dim=8, depth=1, patch=12), 24, CPU, "auto", False)
                                                 for arch in ("convmixer", "vit_cnn")}, load)
    assert visits == [("convmixer", 2, [2, 4, 8]), ("vit_cnn", 2, [2, 4, 8]), ("convmixer", 2, []), ("vit_cnn", 2, []), ("convmixer", 2, [])]
    assert "training_ms" in models[0] and models[1]["failed"] == "out of memory: all of it"
    assert [(row["row"], row["batch_size"]) for row in memory] == [(arch, batch) for arch in ("convmixer", "vit_cnn") for batch in (2, 4, 8)]


def test_a_batch_that_no_memory_holds_fails_in_its_own_process(capsys):
    with pytest.raises(RuntimeError, match="failed"):
        bench.main([*SMALL, "--rows", "convmixer-p24", "--batch-size", "100000000"])
    assert "ConvMixer 24, batch 100000000: out of memory" in capsys.readouterr().out


def test_the_kernels_table_and_its_files(small, tmp_path, capsys):
    bench.main([*SMALL, "--kernels-table", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.md").read_text() == kernels_text(result) and kernels_text(result) in printed
    assert {p.name for p in tmp_path.iterdir()} == {"kernels.json", "kernels.md", "blocks.csv", "convs.csv", "steps.csv"}
    assert len(result["blocks"]) == 2 * 2 * 5 and len(result["convs"]) == 2
    assert [(r["model"], r["way"]) for r in result["steps"]] == [("ConvMixer 24", way) for way in ("eager", "compile", "fused")]
    fused = next(r for r in result["blocks"] if r["way"] == "fused" and r["mode"] == "forward + backward")
    eager = next(r for r in result["blocks"] if r["way"] == "eager")
    activation = 4 * 8 * 8 * 4
    assert fused["gb_s"] == pytest.approx(5 * 2 * activation / fused["ms"] / 1e6)
    assert eager["faster_than_eager"] == 1.0 and fused["p20"] <= fused["ms"] <= fused["p80"]
    # PyTorch saves the statistics beside the activations, we the same: two numbers a channel
    assert eager["saved_bytes_per_sample"] == pytest.approx(3 * activation, abs=64)
    assert fused["saved_bytes_per_sample"] == pytest.approx(activation, abs=64)


@pytest.mark.parametrize("row", [row for row in ROWS if row.arch != "vit_linear"], ids=lambda row: row.name)
def test_peers_are_the_same_networks(row):
    ours = candidates.build(row.arch, row.options, 192, CPU, "torch", False)
    peer = candidates.build_peer(row.arch, row.options, 192, CPU, False)
    assert type(peer).__module__.split(".")[0] in ("timm", "torchvision")
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert measure.forward_flops(peer, 192) == measure.forward_flops(ours, 192)


def test_compare_with_peers_in_turn(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(rows, "build_peer", lambda arch, options, image_size, device, compile: candidates.build(arch, options, image_size, device, "torch", False))
    monkeypatch.setattr(measure, "training_memory", lambda make, load, batches: [{"training_mib": 200.0 if make.func is candidates.build else 100.0}])
    config = bench.read_config([*SMALL, "--image-size", "24", "--batch-size", "2"])[0]
    measured = rows.measure_peers(config, bench.ROWS, measure.Load(2, 24, CPU, None))
    assert [(row["row"], row["way"]) for row in measured] == [("ConvMixer 24", way) for way in ("ours", "timm", "timm, compiled")]
    ours, peer, _ = measured
    assert "time_ratio" not in ours and peer["time_ratio"] == peer["faster"]
    assert peer["memory_ratio"] == 2.0


@pytest.mark.parametrize("arguments, messages", [
    (["--rows", "convmixer-24"], ["no convmixer-24 (did you mean convmixer-p24?)"]),
    (["--image-size", "100"], ["does not suit vit_linear-p24", "does not suit convmixer-p16"]),
    (["--kernels-table", "--repeats", "2"], ["at least 3"]),
    (["--kernels-table", "--peers", "--rows", "resnet18"], ["--peers is of the models' table", "--rows is of"]),
    (["--kernel-table"], ["did you mean --kernels-table"]),
    (["--batch-size", "1", "--max-batch", "-1"], ["--batch-size must be at least 2", "--max-batch must be above 0"]),
    (["--max-batch", "8"], ["only the memory of a GPU"]),
    (["--device", "cpu", "--amp", "fp16"], ["no fp16 training on the CPU"]),
    (["--kernels", "triton"], ["--kernels triton: Triton kernels need a CUDA device"]),
    (["--data", "nowhere"], ["there is no nowhere"]),
    (["--out", __file__], ["cannot write to"]),
])
def test_refusals_come_before_anything_is_measured(arguments, messages):
    if arguments[0] in ("--max-batch", "--kernels", "--out"):
        arguments = ["--device", "cpu", *arguments]
    with pytest.raises(bench.InputError) as e:
        bench.main(arguments)
    for message in messages:
        assert message in str(e.value)
