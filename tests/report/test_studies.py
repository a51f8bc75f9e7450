"""Several learning rates side by side."""
import shutil

import pytest

from mixer.report import __main__ as report
from mixer.runtime.errors import InputError
from tests.helpers.finished import finished_run
from tests.helpers.tables import cells


@pytest.fixture
def folders(tmp_path):
    """Seed 0 at two rates, more seeds of ConvMixer at the better one; ResNet at the usual rate."""
    low, high = tmp_path / "low", tmp_path / "high"
    finished_run(low, "convmixer-p24", val_acc=0.70, step_s=0.01)
    finished_run(low, "vit_cnn-p24", val_acc=0.65)
    finished_run(low, "resnet18", val_acc=0.8)
    finished_run(low, "resnet18", 1, val_acc=0.9)
    for seed, acc in enumerate((0.79, 0.71, 0.73)):
        finished_run(high, "convmixer-p24", seed, val_acc=acc, lr=1e-3, step_s=0.01)
    for seed, acc in enumerate((0.60, 0.70)):
        finished_run(high, "vit_cnn-p24", seed, val_acc=acc, lr=1e-3)
    return low, high


def test_each_row_is_at_its_own_rate_and_judged_on_other_seeds(folders, tmp_path, capsys):
    out = tmp_path / "out"
    report.main([*map(str, folders), "--out", str(out)])
    text = (out / "table.md").read_text()
    assert capsys.readouterr() == (text + "\n", "") and (out / "val_acc_flops.png").exists()
    assert "published" not in text.lower()
    every, chosen = (cells(part)[1:] for part in text.split("\n\n")[::3])
    assert [(line[0], line[2], line[3][:5]) for line in every] == [
        ("ResNet-18, lr 0.0001", "2", "0.850"),
        ("ViT 24 CNN, lr 0.0001 (chosen)", "1", "0.650"),
        ("ViT 24 CNN, lr 0.001", "2", "0.650"),
        ("ConvMixer 24, lr 0.0001", "1", "0.700"),
        ("ConvMixer 24, lr 0.001 (chosen)", "3", "0.743")]
    # not the seed that chose; of three rows' variance: 3.182 * sqrt((0.01 + 0.0002) / 3) = 0.186
    assert [(line[0], line[1], line[2], line[-2]) for line in chosen] == [
        ("ResNet-18, lr 0.0001", "2", "0.850 ± 0.131 *", "tie"),
        ("ViT 24 CNN, lr 0.0001", "1", "0.650 ± 0.186 *", "tie"),
        ("ConvMixer 24, lr 0.001", "2", "0.720 ± 0.131 *", "yes")]


def test_all_options_in_which_they_differ_are_named_where_they_are_on(folders, tmp_path):
    finished_run(tmp_path / "more", "resnet18", val_acc=0.7, clip_grad=1.0, seeds="0")
    finished_run(tmp_path / "more", "convmixer-p24", val_acc=0.7, kernel_size=1)
    report.main([*map(str, folders), str(tmp_path / "more"), "--out", str(tmp_path / "out")])
    titles = {line[0] for line in cells((tmp_path / "out" / "table.md").read_text())}
    assert {"ResNet-18, kernel_size 9, lr 0.0001 (chosen)",
            "ResNet-18, kernel_size 9, lr 0.0001, clip_grad 1.0",
            "ConvMixer 24, kernel_size 1, lr 0.0001"} <= titles


def test_the_runs_of_a_row_are_of_one_recipe_and_each_seed_once(folders):
    low, high = folders
    shutil.copytree(high / "convmixer-p24-seed1", low / "convmixer-p24-seed1")
    with pytest.raises(InputError, match="runs of convmixer-p24 that differ in lr"):
        report.main([str(low)])
    shutil.copytree(high / "convmixer-p24-seed1", high / "convmixer-p24", dirs_exist_ok=True)
    with pytest.raises(InputError, match="two runs of convmixer-p24 with seed 1"):
        report.main([str(high)])


def test_which_folders_and_where_to(folders, tmp_path):
    (low, high), out, dated = folders, ["--out", tmp_path / "out"], tmp_path / "dated"
    shutil.copytree(low / "resnet18", dated / "resnet18-20260101-000000")  # train.py without --out
    several, unfinished = "several folders need --out", "name a folder that holds finished runs"
    for arguments, message in (
            (folders, several), ([low, *out], several), ([low / "vit_cnn-p24"], unfinished),
            ([low, tmp_path / "nowhere", *out], unfinished), ([dated], unfinished),
            ([high, low, high, *out], "hold vit_cnn-p24 with seed 0 and equal options")):
        with pytest.raises(InputError, match=message):
            report.main(list(map(str, arguments)))
