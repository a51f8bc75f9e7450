"""Tables that fit a terminal, whatever is in them, and say what failed and what was measured."""
import json

import pytest

from mixer.experiments import ROWS
from mixer.report import tables
from mixer.report.measurements import measured_text
from mixer.report.tables import number, spread, table
from tests.helpers.tables import COMMITTED, cells

GPU = {"device": "NVIDIA H200", "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0",
       "cuda": "13.0", "date": "2026-11-22"}
CPU = {**GPU, "device": "AMD EPYC 9575F 64-Core Processor, 128 threads", "cuda": None}
CONFIG = {"batch_size": 250, "image_size": [192], "kernels": "auto", "compile": True, "amp": "fp16",
          "data": "cats.zip", "kernels_table": False, "repeats": 12, "out": None}
OUT = ("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. "
       + "GPU 0 has a total capacity of which so much is free. " * 4)
MEMORY = {"training_mib": 12_345.6, "process_mib": 34_567.8}
# the most digits that a CPU or a GPU would give
MODEL = {"image_size": 192, "batch_size": 250, "parameters": 13_524_482, "gflop_per_image": 3.934,
         "saved_mib_per_image": 42.62, **MEMORY,
         **{f"training_{t}": 98_765.4 for t in ("ms", "p20", "p80")},
         "training_images_per_s": 54_321.0,
         **{f"inference_{t}": 98_765.4 for t in ("ms", "p20", "p80")},
         "inference_images_per_s": 154_321.0, "seconds_per_25000_images": 9_765.4,
         "faster": 0.5, "memory_ratio": 1.25}


def result(environment=GPU, failing=False):
    """As in bench.json."""
    models = [{"row": title, **MODEL} for title in (*(row.title for row in ROWS), "Other")]
    if failing:
        models[1::2] = [{"row": row["row"], "image_size": 192, "batch_size": 250, "failed": OUT}
                        for row in models[1::2]]
    peers = [{"row": "ResNet-18", "candidate": "ours", **MODEL},
             {"row": "ResNet-18", "candidate": "torchvision, compiled", "image_size": 192,
              "failed": OUT}]
    data = [{"stage": "packing, all cores", "images_per_s": 12_345.6, "p20": 12_345.6,
             "p80": 12_345.6}]
    return {"environment": environment, "config": CONFIG, "models": models, "peers": peers,
            "data": data}


@pytest.mark.parametrize("environment", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_table_fits_a_terminal_and_says_what_it_was_measured_on(environment):
    for failing in (False, True):
        text = measured_text(result(environment, failing))
        assert max(map(len, text.splitlines())) <= tables.WIDTH == 120
        head = text.split("\n\n")[0]
        for word in (environment["device"], "torch 2.11.0", "amp fp16", "batch_size 250",
                     "image_size [192]", "2026-11-22", "compile True", "cats.zip"):
            assert word in " ".join(head.split())
        assert ("these numbers say nothing about GPUs" in text) == (environment is CPU)


def test_a_failed_row_stays_and_says_why():
    text = measured_text(result(failing=True))
    time, memory = cells(text, "EfficientNetV2-B0")
    assert time == ["EfficientNetV2-B0", "out of memory", *[""] * 4]
    assert memory == ["EfficientNetV2-B0", "out of memory", "", "250", *[""] * 3]
    assert "row EfficientNetV2-B0; image_size 192; batch_size 250; failed out of memory" in text
    peer = cells(text, "ResNet-18")[3]
    assert peer == ["ResNet-18", "torchvision, compiled", "out of memory", "", "", ""]


def test_figures_stand_where_they_belong():
    text = measured_text(result())
    time, memory, ours = cells(text, "ResNet-18")[:3]
    assert time == ["ResNet-18", "98765 [98765, 98765]", "54,321", "9,765",
                    "98765 [98765, 98765]", "154,321"]
    assert memory == ["ResNet-18", "13,524,482", "3.93", "250", "42.6", "12,346", "34,568"]
    assert ours[2:] == ["98765 [98765, 98765]", "0.50", "12,346", "1.25"]
    assert cells(text, "packing")[0][1:] == ["12346 [12346, 12346]"]


def test_the_kernels_table_of_what_failed():
    """The committed table is the test of the others."""
    failed = {"shape": "8, 64, 12x12, 9", "failed": OUT}
    step = {"row": "timm convmixer_1024_20_ks9_p14", "image_size": 224, "batch_size": 64}
    steps = [{**MODEL, **step, "candidate": "eager"}, {**step, "candidate": "fused", "failed": OUT}]
    text = measured_text({"environment": GPU, "config": CONFIG, "blocks": [failed],
                         "shapes": [failed], "steps": steps})
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert [line[1] for line in cells(text, "8, 64")] == ["out of memory"]
    assert text.count("shape 8, 64, 12x12, 9; failed out of memory") == 2
    assert cells(text, "timm")[1][2] == "out of memory"


def test_several_image_sizes_of_a_row_stand_together():
    sizes = {**CONFIG, "image_size": [192, 288]}
    models = [{"row": title, **MODEL, "image_size": side} for side in (192, 288)
              for title in ("ViT 16 CNN", "ResNet-18")]
    models[-1] = {"row": "ResNet-18", "batch_size": 250, "image_size": 288, "failed": OUT}
    peers = [{**row, "candidate": "ours"} for row in models]
    text = measured_text({"environment": GPU, "config": sizes, "models": models, "peers": peers})
    assert "image_size [192, 288]" in " ".join(text.split())
    lines = cells(text)
    assert [line[0] for line in lines if "px" in line[0]] == 3 * [
        "ViT 16 CNN, 192 px", "ViT 16 CNN, 288 px", "ResNet-18, 192 px", "ResNet-18, 288 px"]
    assert "row ResNet-18; batch_size 250; image_size 288; failed out of memory" in text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_tables_are_those_of_their_json(path):
    assert path.with_suffix(".md").read_text() == measured_text(json.loads(path.read_text()))


def test_columns_line_up():
    columns = [("row", "{row}"), ("n", "{n:,}"), ("ms", spread("ms", "low", "high")),
               ("none", "{none}")]
    rows = [{"row": "a", "n": 1000, "ms": 12.34, "low": 1.0, "high": 123.4},
            {"row": "longer", "n": 2}, {"row": "b", "failed": "not run"}]
    assert table(rows, columns).splitlines() == [
        "| row    |       n |               ms |",
        "|--------|--------:|-----------------:|",
        "| a      |   1,000 | 12.3 [1.00, 123] |",
        "| longer |       2 |                  |",
        "| b      | not run |                  |"]
    assert [number(value) for value in (0.123, 1.234, 12.34, 123.4, 12345.6)] == [
        "0.12", "1.23", "12.3", "123", "12,346"]
