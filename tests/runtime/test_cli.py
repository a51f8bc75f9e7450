"""train.py as a user starts it: exit codes, messages, files; and the option list behind it."""
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from tests.helpers.commands import ROOT, TINY, same_run
from PIL import Image

import train as script
from mixer.runtime.checkpoint import load_checkpoint
from mixer.models import load_weights
from mixer.training.config import Config, DEMO, as_arguments, read_config
from mixer.training.resume import resume_identity
from mixer.runtime.errors import InputError
from mixer.experiments import ROWS
from mixer.runtime.files import read_csv
from mixer.models import create_model


def test_a_run_leaves_everything_it_promises(train, pictures, tmp_path):
    out = tmp_path / "run"
    result = train(*TINY, "--data", pictures, "--steps", 25, "--log-every", 10, "--out", out, "--lr", 0.003)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no bar where there is no terminal"
    assert result.stdout.startswith("config: arch convmixer, patch 8")
    assert f"40 images in {pictures.name} (class in the file name, folder), 2 classes: cat 20, dog 20" in result.stdout
    assert "36 training and 4 validation images" in result.stdout
    assert [line.split("|")[0].split()[1] for line in result.stdout.splitlines() if line.startswith("step ")] == ["10", "20", "25"]
    assert {p.name for p in out.iterdir()} == {".lock", "config.json", "environment.json", "split.json", "log.csv", "curves.png",
                                               "last.pt", "best.pt", "summary.json"}
    config, split, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "split", "summary"))
    assert config["steps"] == 25 and config["lr"] == 0.003 and config["heads"] is None
    assert len(split["train"]) == 36 and len(split["val"]) == 4 and split["classes"] == ["cat", "dog"]
    log = read_csv(out / "log.csv")
    assert [row["step"] for row in log] == [10, 20, 25] and log[0]["train_loss"] > log[-1]["train_loss"]
    assert summary["val_acc"] == log[-1]["val_acc"] and summary["confusion"] == load_checkpoint(out / "last.pt")["state"]["confusion"]
    assert sum(map(sum, summary["confusion"])) == 4 and summary["seconds_per_25000_images"] == 25000 / summary["images_per_s"]
    load_weights(create_model("convmixer", image_size=32, patch=8, dim=16, depth=1, kernel_size=3), out / "best.pt")

    again = train(*TINY, "--data", pictures, "--steps", 25, "--out", out, "--lr", 0.003)
    assert again.returncode == 2 and "holds another run" in again.stderr and "--resume auto" in again.stderr
    before = (out / "last.pt").read_bytes()
    finished = train(*TINY, "--data", pictures, "--steps", 25, "--out", out, "--lr", 0.003, "--resume", "auto")
    assert finished.returncode == 0 and "trained already" in finished.stdout and (out / "last.pt").read_bytes() == before
    other = train(*TINY, "--data", pictures, "--steps", 25, "--out", out, "--lr", 0.1, "--resume", "auto")
    assert other.returncode == 2 and "lr is 0.003 there and 0.1 here" in other.stderr
    longer = train(*TINY, "--data", pictures, "--steps", 30, "--log-every", 10, "--out", out, "--lr", 0.003, "--resume", "auto")
    assert longer.returncode == 0, longer.stderr
    assert [row["step"] for row in read_csv(out / "log.csv")] == [10, 20, 25, 30]


def test_folder_and_zip_give_the_same_run(train, pictures, tmp_path):
    shutil.make_archive(str(tmp_path / "train"), "zip", pictures)
    for data, out in ((pictures, "folder"), (tmp_path / "train.zip", "zip")):
        result = train(*TINY, "--data", data, "--steps", 12, "--out", tmp_path / out)
        assert result.returncode == 0, result.stderr
    same_run(tmp_path / "folder", tmp_path / "zip")
    assert (tmp_path / "folder" / "split.json").read_text() == (tmp_path / "zip" / "split.json").read_text()


def test_without_validation(train, pictures, tmp_path):
    result = train(*TINY, "--data", pictures, "--steps", 4, "--val-fraction", 0, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_acc"] is None and summary["best_step"] is None and not (tmp_path / "run" / "best.pt").exists()
    assert "40 training and 0 validation images" in result.stdout and "final train accuracy" in result.stdout


def test_damaged_images_stop_or_are_left_out(train, pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "damaged")
    (data / "cat.1.png").write_bytes(b"")
    (data / "dog.2.png").write_bytes((data / "dog.2.png").read_bytes()[:500])
    stopped = train(*TINY, "--data", data, "--steps", 4, "--out", tmp_path / "run")
    assert stopped.returncode == 2 and len(stopped.stderr.splitlines()) == 1
    assert "2 of 40 images do not decode: cat.1.png (empty file), dog.2.png" in stopped.stderr
    skipped = train(*TINY, "--data", data, "--steps", 4, "--out", tmp_path / "run", "--bad-images", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "left out 2 of 40" in skipped.stdout and "34 training and 4 validation" in skipped.stdout
    assert (tmp_path / "run" / "bad_images.csv").read_text().count("\n") == 3


def test_a_progress_bar_on_a_terminal(pictures, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows, columns
    process = subprocess.Popen([sys.executable, "train.py", *TINY, "--data", pictures, "--steps", "200", "--out", tmp_path / "run"],
                               cwd=ROOT, stdout=theirs, stderr=theirs, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert "200/200" in text and "images/s" in text.split("200/200")[0] and "loss 0." in text and "<" in text


def test_three_classes_and_compile(train, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "data" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    result = train(*TINY, "--data", tmp_path / "data", "--steps", 3, "--compile", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    names = set(load_checkpoint(tmp_path / "run" / "last.pt")["state_dict"])
    assert "head.weight" in names and not any("_orig_mod" in name for name in names)
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["confusion"]) == 3


def test_a_loss_that_explodes_exits_with_3(train, pictures, tmp_path):
    result = train(*TINY, "--data", pictures, "--steps", 40, "--log-every", 4, "--lr", 1e30, "--out", tmp_path / "run")
    assert result.returncode == 3 and "training loss is" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_require_acc(train, pictures, tmp_path):
    result = train(*TINY, "--data", pictures, "--steps", 2, "--require-acc", 1, "--out", tmp_path / "run")
    assert result.returncode == 1 and "below --require-acc" in result.stderr


def test_arch_all_goes_on_after_a_failure_and_resumes(train, pictures, tmp_path):
    """Nine rows, one of which cannot write its results; then the cause is removed and the rest is done."""
    out = tmp_path / "all"
    out.mkdir()
    (out / "convmixer-p16").write_text("a file where a folder should be")
    arguments = ["--arch", "all", "--data", pictures, "--image-size", 48, "--batch-size", 4, "--steps", 2, "--device", "cpu", "--out", out]
    first = train(*arguments)
    assert first.returncode == 1 and "ConvMixer 16 failed with exit code 2; going on" in first.stderr
    table = (out / "table.md").read_text()
    assert "| ConvMixer 16 | failed (exit code 2)" in table and "| ConvMixer 16/8 | 2," in table
    before = {row.name: (out / row.name / "last.pt").stat().st_mtime_ns for row in ROWS if row.name != "convmixer-p16"}
    (out / "convmixer-p16").unlink()
    second = train(*arguments, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("trained already") == 8 and "9 of 9 rows done" in second.stdout
    assert all((out / name / "last.pt").stat().st_mtime_ns == then for name, then in before.items())
    assert "failed" not in (out / "table.md").read_text()
    for name in ("loss.png", "acc.png"):
        with Image.open(out / name) as image:
            assert image.width > 800


def test_wrong_arguments_are_told_before_anything_is_made(train, tmp_path):
    result = train("--arch", "vit_cnn", "--patch", 20, "--lr", "nan", "--batch_size", 3, "--data", "x", "--out", tmp_path / "run")
    assert result.returncode == 2 and result.stdout == "" and not (tmp_path / "run").exists()
    assert result.stderr.splitlines() == [
        "error: unknown argument --batch_size (did you mean --batch-size?)",
        "error: --lr must be above 0, not nan",
        "error: patch 20 does not divide a 192x192 image (these do: 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192)"]


def test_debug_shows_the_traceback(train, tmp_path):
    assert "Traceback" in train("--data", tmp_path / "none", "--debug", "--out", tmp_path / "run").stderr


@pytest.mark.parametrize("arguments, message", [
    (["--arch", "vit_cn"], "did you mean vit_cnn?"),
    (["--arch", "resnet18", "--patch", "24"], "resnet18 has no patch"),
    (["--arch", "resnet18", "--kernel-size", "9", "--depth", "2"], "resnet18 has no depth\nresnet18 has no kernel_size"),
    (["--arch", "all", "--patch", "24"], "--arch all sets --patch itself"),
    (["--arch", "convmixer", "--kernel-size", "4"], "kernel_size 4 is even"),
    (["--arch", "convmixer", "--depth", "0"], "depth must be a positive whole number, not 0"),
    (["--dim", "100"], "dim 100 does not divide into 8 heads"),
    (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    (["--batch-size", "many"], "--batch-size must be a whole number, not 'many'"),
    (["--steps", "0"], "--steps must be at least 1, not 0"),
    (["--lr", "-1"], "--lr must be above 0, not -1.0"),
    (["--lr", "inf"], "--lr must be above 0, not inf"),
    (["--val-fraction", "1"], "--val-fraction must be below 1, not 1.0"),
    (["--schedule", "cosin"], "did you mean cosine?"),
    (["--steps", "3", "--epochs", "2"], "--steps and --epochs exclude each other"),
    (["--resume", "auto"], "--resume auto needs --out"),
    (["--step", "3"], "unknown argument --step (did you mean --steps?)"),
    (["--steps"], "expected one argument"),
    (["surplus"], "unknown argument surplus"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError) as e:
        read_config(arguments, "")
    assert message in str(e.value)


@pytest.mark.parametrize("arguments, message", [
    (["--batch-size", "37"], "--batch-size 37 is more than the 36 training images"),
    (["--device", "cuda:7"], "--device cuda:7 is not there"),
    (["--amp", "fp16"], "no fp16 training on the CPU"),
    (["--kernels", "triton"], "--kernels triton: Triton kernels need a CUDA device, and this is cpu"),
    (["--resume", "nowhere.pt"], "--resume: there is no checkpoint nowhere.pt"),
    (["--batch-size", "1"], "--batch-size 1: BatchNorm"),
])
def test_what_only_the_machine_or_the_data_can_tell(train, pictures, tmp_path, arguments, message):
    result = train(*TINY, "--data", pictures, "--steps", 1, "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_kernels_are_chosen_said_and_interchangeable(pictures, tmp_path, capsys):
    """The plain run's checkpoint goes on fused, to the losses of the run that was fused throughout."""
    common = [*map(str, [*TINY, "--data", pictures, "--cache", tmp_path, "--log-every", 5])]
    for out, kernels, steps, said in (("fused", "auto", 10, "1 depthwise units fused, on the CPU (Triton kernels need a CUDA device"),
                                      ("both", "torch", 5, "plain PyTorch (--kernels torch)"),
                                      ("both", "auto", 10, "1 depthwise units fused")):
        script.main([*common, "--out", str(tmp_path / out), "--resume", "auto", "--steps", str(steps), "--kernels", kernels])
        assert f"kernels: {said}" in capsys.readouterr().out
    a, b = (read_csv(tmp_path / out / "log.csv") for out in ("fused", "both"))
    assert [row["train_loss"] for row in b] == pytest.approx([row["train_loss"] for row in a], rel=1e-4)
    script.main([*map(str, ["--arch", "vit_linear", "--patch", 8, "--dim", 16, "--heads", 2, "--depth", 1, "--image-size", 32, "--batch-size", 8,
                            "--device", "cpu", "--data", pictures, "--cache", tmp_path, "--steps", 1, "--out", tmp_path / "vit"])])
    assert "kernels: plain PyTorch (ViT has no depthwise" in capsys.readouterr().out


def test_a_second_run_in_one_folder_is_refused(train, pictures, tmp_path):
    arguments = [*TINY, "--data", pictures, "--out", tmp_path / "run", "--resume", "auto"]
    first = train.start(*arguments, "--steps", 100_000).wait_for("into")
    second = train(*arguments, "--steps", 100_000)
    first.send(signal.SIGTERM)
    assert second.returncode == 2 and "another process is training" in second.stderr and first.wait().returncode == 143


def test_the_demo_takes_its_own_settings_and_the_command_line_comes_first():
    assert {key: getattr(read_config([], ""), key) for key in DEMO} == DEMO
    assert read_config(["--steps", "7"], "").steps == 7
    given = read_config(["--data", "x"], "")
    assert (given.batch_size, given.steps, given.lr, given.image_size) == (250, 5000, 1e-4, 192)
    assert (given.patch, given.dim, given.depth, given.heads, given.kernel_size) == (24, 512, 4, 8, None)


def test_as_arguments_gives_the_same_config_back():
    for argv in (["--data", "x", "--compile", "--epochs", "2.5", "--clip-grad", "1"], ["--arch", "convmixer", "--patch", "8"]):
        config = read_config(argv, "")
        arguments = as_arguments(config) + (["--data", "x"] if config.data is None else [])
        again = read_config(arguments, "")
        assert {**vars(again), "data": config.data} == vars(config)


def test_every_option_is_free_on_resume_or_part_of_the_run():
    base = resume_identity(Config(), "data")
    assert base["batch_size"] == 250 and "steps" not in base and "out" not in base
    assert "steps" in resume_identity(Config(schedule="cosine"), "data")
