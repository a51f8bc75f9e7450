"""A log as a line, and the table of --arch all."""
import pytest
import torch

from mixer.experiments import ROWS, published_curves
from mixer.report.runs import comparison_table, describe
from mixer.runtime.device import environment
from tests.helpers.tables import RESULTS, cells

SUMMARY = {"parameters": 2_114_050, "val_acc": 0.75, "best_val_acc": 0.8, "train_acc": 0.9,
           "images_per_s": 1000.0, "seconds_per_25000_images": 25.0, "memory_mib": 1234.0,
           "data": "4,000 images", "image_size": 192, "batch_size": 32, "steps": 300,
           "dtype": "float32", "seed": 0}
ROW = {"step": 100, "train_loss": 0.6, "train_acc": 0.6, "val_loss": 0.69, "val_acc": 0.5,
       "lr": 1e-4, "images_per_s": 100.0, "data_wait": 0.03, "memory_mib": 900.0, "skipped": 0}


def test_the_table_keeps_ours_and_the_published_figures_apart():
    no_rates = {**SUMMARY, "val_acc": None, "best_val_acc": None, "images_per_s": None,
                "seconds_per_25000_images": None}
    table = comparison_table({"convmixer-p24": SUMMARY, "resnet18": "failed (exit code 1)",
                              "vit_cnn-p24": no_rates}, environment(torch.device("cpu")))
    rows = {title: rest for title, *rest in cells(table)[1:]}
    assert list(rows) == [row.title for row in ROWS]
    acc = {name: f"{points[-1][2]:.3f}" for name, points in published_curves().items()}
    assert rows["ConvMixer 24"] == ["2,114,050", "0.750", "0.800", "0.900", acc["convmixer-p24"],
                                    "1,000", "25.0", "11", "1,234", "2,132"]
    assert rows["ResNet-18"] == ["failed (exit code 1)", "", "", "", acc["resnet18"], "", "", "20",
                                 "", "4,554"]
    assert rows["ViT 24 CNN"][1] == "" and rows["ConvMixer 16"][0] == "not run"
    for word in ("RTX 2080", "nvidia-smi", "computed from the measured images/s", "resident",
                 torch.__version__.split("+")[0]):
        assert word in table


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/table.md")), ids=lambda p: p.parent.name)
def test_committed_tables_have_the_form_of_the_code(path):
    head, _, *lines = comparison_table({}, {}).splitlines()
    committed = path.read_text().splitlines()
    assert cells(committed[0]) == cells(head) and len({len(line) for line in committed[:11]}) == 1
    for ours, line in zip(committed[2:11], lines, strict=True):
        (ours,), (line,) = cells(ours), cells(line)
        assert [ours[i] for i in (0, 5, 8, 10)] == [line[i] for i in (0, 5, 8, 10)]  # published


def test_a_line_of_the_log():
    assert "val loss 0.6900 acc 0.500 | 100 images/s, 3% of it data | 900 MiB" in describe(ROW)
    no_validation = describe({**ROW, "val_loss": None, "val_acc": None, "images_per_s": None})
    assert "val" not in no_validation and "images/s" not in no_validation
