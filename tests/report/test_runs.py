from pathlib import Path

import pytest
import torch
from PIL import Image

from mixer.experiments import ROWS, published_curves
from mixer.runtime.files import read_csv, write_csv
from mixer.report.runs import comparison_table, describe
from mixer.runtime.device import environment
from mixer.report.figures import draw_comparison, draw_curves

LOG = [{"step": s, "train_loss": 0.7 - s / 1000, "train_acc": 0.5 + s / 1000, "val_loss": 0.69, "val_acc": 0.5, "lr": 1e-4,
        "images_per_s": 100.0, "data_wait": 0.03, "memory_mib": 900.0, "skipped": 0} for s in (100, 200)]


def summary(**changes):
    return {"parameters": 2_114_050, "val_acc": 0.75, "best_val_acc": 0.8, "train_acc": 0.9, "images_per_s": 1000.0,
            "seconds_per_25000_images": 25.0, "memory_mib": 1234.0, "data": "4,000 images", "image_size": 192,
            "batch_size": 32, "steps": 300, "dtype": "float32", "seed": 0, **changes}


def cells(table):
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in table.splitlines() if line.startswith("| ") and not line.startswith("| row")}


def test_the_table_keeps_ours_and_the_published_figures_apart():
    table = comparison_table({"convmixer-p24": summary(), "resnet18": "failed (exit code 1)",
                              "vit_cnn-p24": summary(val_acc=None, best_val_acc=None, images_per_s=None, seconds_per_25000_images=None)},
                             environment(torch.device("cpu")))
    rows = cells(table)
    assert list(rows) == [row.title for row in ROWS]
    acc = {name: f"{points[-1][2]:.3f}" for name, points in published_curves().items()}
    assert rows["ConvMixer 24"] == ["2,114,050", "0.750", "0.800", "0.900", acc["convmixer-p24"], "1,000", "25.0", "11", "1,234", "2,132"]
    assert rows["ResNet-18"] == ["failed (exit code 1)", "", "", "", acc["resnet18"], "", "", "20", "", "4,554"]
    assert rows["ViT 24 CNN"][1] == "" and rows["ConvMixer 16"][0] == "not run"
    for word in ("RTX 2080", "nvidia-smi", "computed from the measured images/s", "resident", torch.__version__.split("+")[0]):
        assert word in table


def test_figures_are_drawn(tmp_path):
    draw_curves(tmp_path / "curves.png", LOG, "a run")
    draw_comparison(tmp_path, {"convmixer-p24": LOG, "resnet18": LOG[:1]})
    for name in ("curves.png", "loss.png", "acc.png"):
        with Image.open(tmp_path / name) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
            assert image.width > 800 and len(colours) > 50  # lines, not an empty page
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "loss.png", "acc.png"}


def test_a_run_without_validation_is_drawn_and_told(tmp_path):
    log = [{**row, "val_loss": None, "val_acc": None, "images_per_s": None} for row in LOG]
    draw_curves(tmp_path / "curves.png", log, "no validation")
    assert "val" not in describe(log[0]) and "images/s" not in describe(log[0])
    assert "val loss 0.6900 acc 0.500 | 100 images/s, 3% of it data | 900 MiB" in describe(LOG[0])


def test_csv_comes_back_as_it_was(tmp_path):
    rows = [{**LOG[0], "val_acc": None}, LOG[1]]
    write_csv(tmp_path / "log.csv", rows)
    assert read_csv(tmp_path / "log.csv") == rows
    text = Path(tmp_path / "log.csv").read_text()
    assert text.count("step") == 1 and text.count("\n") == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_csv(tmp_path / "log.csv", LOG)
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(ValueError):
        write_csv(tmp_path / "log.csv", LOG + [{"other": 1}])
    assert (tmp_path / "log.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_environment_names_what_a_number_was_measured_on():
    env = environment(torch.device("cpu"))
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert "threads" in env["device"] and env["cuda"] is None and len(env["date"]) == 10
