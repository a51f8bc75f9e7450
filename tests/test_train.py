"""train.py as a user starts it: exit codes, messages, files."""
import os
import re
import shutil
import signal

import pytest
from PIL import Image

import train as script
from mixer.models import load_weights
from mixer.models.weights import load_checkpoint
from mixer.report import __main__ as report
from mixer.runtime.files import read_csv
from tests.helpers.commands import TINY, assert_error, succeeded
from tests.helpers.networks import tiny_convmixer
from tests.helpers.pictures import copied
from tests.helpers.plants import TRAIN_STEP, Plant
from tests.helpers.runs import assert_same_run, read_json
from tests.helpers.tables import cells

pytestmark = pytest.mark.faults


def test_a_run_leaves_everything_it_promises(train, pictures, tmp_path, out):
    arguments = [*TINY, "--data", pictures, "--log-every", 10, "--out", out, "--lr", 0.003]
    result = succeeded(train(*arguments, "--steps", 25))
    assert result.stderr == "", "no bar where there is no terminal"
    lines = result.stdout.splitlines()
    changed = result.stdout.split("device:")[0]
    assert changed.startswith("config: arch convmixer, patch 8, dim 16,")
    assert "act gelu" not in changed and "weight_decay" not in changed, "no default"
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    assert re.fullmatch(r"final val accuracy [01]\.\d+ after \d\.\d minutes, in .*/run", lines[-1])
    assert (f"40 images in {pictures.name} (class in the file name, folder), "
            "2 classes: cat 20, dog 20") in result.stdout
    assert "36 training and 4 validation images" in result.stdout
    steps = [line.split("|")[0].split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["10", "20", "25"]

    # the files
    assert {p.name for p in out.iterdir()} == {
        ".lock", "config.json", "environment.json", "split.json", "log.csv", "curves.png",
        "last.pt", "best.pt", "summary.json", "mistakes.png", "filters.png"}
    config, split, summary = (read_json(out / f"{name}.json")
                              for name in ("config", "split", "summary"))
    assert config["steps"] == 25 and config["lr"] == 0.003 and config["heads"] is None
    assert len(split["train"]) == 36 and len(split["val"]) == 4
    assert split["classes"] == ["cat", "dog"]
    log = read_csv(out / "log.csv")
    assert [row["step"] for row in log] == [10, 20, 25]
    assert log[0]["train_loss"] > log[-1]["train_loss"]
    assert summary["val_acc"] == log[-1]["val_acc"]
    assert summary["confusion"] == load_checkpoint(out / "last.pt")["state"]["confusion"]
    assert sum(map(sum, summary["confusion"])) == 4
    assert summary["seconds_per_25000_images"] == 25000 / summary["images_per_s"]
    load_weights(tiny_convmixer(), out / "best.pt")

    succeeded(train(*arguments, "--steps", 30, "--resume", "auto"))
    assert [row["step"] for row in read_csv(out / "log.csv")] == [10, 20, 25, 30]


def test_folder_and_zip_give_the_same_run(train, pictures, tmp_path):
    """The same bits, as each run of one command has."""
    shutil.make_archive(str(tmp_path / "train"), "zip", pictures)
    for data, out in ((pictures, "folder"), (tmp_path / "train.zip", "zip")):
        succeeded(train(*TINY, "--data", data, "--steps", 12, "--out", tmp_path / out))
    assert_same_run(tmp_path / "folder", tmp_path / "zip")
    splits = [(tmp_path / out / "split.json").read_text() for out in ("folder", "zip")]
    assert splits[0] == splits[1]


def test_without_validation(train, pictures, out):
    result = succeeded(train(*TINY, "--data", pictures, "--steps", 4, "--val-fraction", 0,
                             "--out", out))
    summary = read_json(out / "summary.json")
    assert summary["val_acc"] is None and summary["best_step"] is None
    assert not (out / "best.pt").exists()
    assert "40 training and 0 validation images" in result.stdout
    assert "final train accuracy" in result.stdout


def test_three_classes_and_compile(train, pictures, tmp_path, out):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    data = copied(pictures, tmp_path / "data", lambda i, name: f"{'abc'[i % 3]}/{i}.png")
    succeeded(train.start(*TINY, "--data", data, "--steps", 3, "--compile", "--out", out).wait())
    names = set(load_checkpoint(out / "last.pt")["state_dict"])
    assert "head.weight" in names and not any("_orig_mod" in name for name in names)
    assert len(read_json(out / "summary.json")["confusion"]) == 3


def test_several_rows_go_on_after_a_failure_and_resume(train, pictures, tmp_path):
    """One of them cannot write its results; then the cause is removed."""
    out = tmp_path / "all"
    out.mkdir()
    (out / "convmixer-p16").write_text("a file where a folder should be")
    arguments = ["--arch", "all", "--rows", "convmixer-p16,convmixer-p24", "--data", pictures,
                 "--image-size", 48, "--batch-size", 4, "--steps", 2, "--device", "cpu",
                 "--out", out, "--cache", tmp_path / "cache"]
    first = train.start(*arguments).wait()
    assert first.returncode == 1
    assert "ConvMixer 16 failed with exit code 2; continuing" in first.stderr
    table = " ".join((out / "table.md").read_text().split())  # the columns are aligned
    assert "convmixer-p16: failed (exit code 2)" in table and "| ConvMixer 24 | 2," in table

    finished = out / "convmixer-p24" / "last.pt"
    before = finished.stat().st_mtime_ns
    (out / "convmixer-p16").unlink()
    second = succeeded(train.start(*arguments, "--resume", "auto").wait())
    assert second.stdout.count("trained already") == 1 and "2 of 2 runs done" in second.stdout
    assert finished.stat().st_mtime_ns == before
    assert "failed" not in (out / "table.md").read_text()
    for name in ("loss.png", "acc.png", "val_acc_seconds.png", "val_acc_flops.png"):
        with Image.open(out / name) as image:
            assert image.width > 800


def test_several_seeds_of_one_model_resume_and_are_reported_again(train, pictures, out):
    """A run with seed 0, then one more seed; then the table again without images, checkpoints."""
    arguments = [*TINY, "--data", pictures, "--steps", 10, "--log-every", 5]
    succeeded(train(*arguments, "--out", out / "convmixer-p8-d1"))
    several = succeeded(train.start(*arguments, "--out", out, "--seeds", "0,1").wait())
    assert several.stdout.count("trained already") == 1 and "2 of 2 runs done" in several.stdout
    for seed, folder in enumerate(("", "-seed1")):
        folder = f"convmixer-p8-d1{folder}"
        assert read_json(out / folder / "summary.json")["seed"] == seed
        log = read_csv(out / folder / "log.csv")
        assert log[1]["flops"] == 2 * log[0]["flops"]
    table = (out / "table.md").read_text()
    assert cells(table, "convmixer-p8-d1")[0][2] == "2"

    names = ["table.md", "loss.png", "acc.png", "val_acc_seconds.png", "val_acc_flops.png"]
    before = {name: (out / name).read_bytes() for name in names}
    for path in [out / name for name in names] + list(out.glob("*/*.pt")):
        path.unlink()
    report.main([str(out)])
    assert {name: (out / name).read_bytes() for name in names} == before


@pytest.mark.parametrize("arguments, message", [
    (["--batch-size", "37"],
     "--batch-size 37: must be at least 1 (ranks) and at most 36 (training images)"),
    (["--device", "cuda:7"], "--device cuda:7: no such device"),
    (["--resume", "nowhere.pt"], "nowhere.pt is not a readable checkpoint")])
def test_what_only_the_machine_or_the_data_can_tell(train, pictures, out, arguments, message):
    result = train(*TINY, "--data", pictures, "--steps", 1, "--out", out, *arguments)
    assert_error(result, 2, message)


def test_kernels_are_chosen_named_and_interchangeable(pictures, tmp_path, capsys):
    """The plain run's checkpoint goes on fused, to the losses of a run that is fused throughout. In
    float32, where both round alike but for the order of sums: the losses differ by a few eps. In
    bfloat16 they round at different places, and 10 steps drift apart by 1e-4."""
    common = [*TINY, "--data", pictures, "--cache", tmp_path, "--log-every", 5, "--resume", "auto",
              "--amp", "off"]
    for out, kernels, steps, printed in (
            ("fused", "auto", 10, "1 depthwise units fused"), ("both", "torch", 5, "plain PyTorch"),
            ("both", "auto", 10, "1 depthwise units fused")):
        arguments = [*common, "--out", tmp_path / out, "--steps", steps, "--kernels", kernels]
        script.main(list(map(str, arguments)))
        assert f"kernels: {printed}" in capsys.readouterr().out
    fused, both = (read_csv(tmp_path / out / "log.csv") for out in ("fused", "both"))
    losses = [row["train_loss"] for row in fused]
    assert [row["train_loss"] for row in both] == pytest.approx(losses, rel=1e-6)


def test_fine_tuning_starts_from_another_run(train, pictures, tmp_path):
    first = tmp_path / "first" / "best.pt"
    common = [*TINY, "--data", pictures, "--steps", 2, "--resume", "auto"]
    succeeded(train(*common, "--out", first.parent))
    start = shutil.copy(first, tmp_path / "start.pt")
    arguments = [*common, "--out", tmp_path / "second", "--init-from"]
    result = succeeded(train(*arguments, start))
    assert "start.pt: loaded 23 of 23 tensors (stem.0.weight, " in result.stdout
    assert "newly initialised: none" in result.stdout

    os.remove(start)
    longer = succeeded(train(*arguments, start, "--steps", 3))
    assert "--init-from ignored: resuming from the checkpoint" in longer.stdout
    other = train(*arguments, tmp_path / "second" / "last.pt", "--steps", 4)
    assert_error(other, 2, "of another run: init_from was '")
    relu = train(*arguments, first, "--out", tmp_path / "third", "--act", "relu")
    assert_error(relu, 2, "trained with act 'gelu', and this model has 'relu'")


def test_what_was_written_for_a_shorter_run_does_not_stay(train, pictures, out):
    """A longer run that fails must not look finished, and old faults are not those of new data."""
    arguments = [*TINY, "--data", pictures, "--out", out, "--resume", "auto"]
    succeeded(train(*arguments, "--steps", 2))
    (out / "bad_images.csv").write_text("of images that were repaired")
    longer = train(*arguments, "--steps", 4, plants=[Plant(TRAIN_STEP, signal.SIGKILL, 2)])
    assert longer.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists() and not (out / "bad_images.csv").exists()
    assert_error(train(*arguments, "--steps", 1), 2, "the checkpoint is at step 2 already")
