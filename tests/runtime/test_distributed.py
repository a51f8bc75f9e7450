"""Several ranks train one run: the numbers of one process, one writer, one end for all. torchrun
starts them where its own part matters, otherwise its environment variables do."""
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from mixer.models.weights import load_checkpoint
from mixer.runtime.files import read_csv
from tests.helpers.commands import HANGS, ROOT, TINY, TINY_VIT, succeeded
from tests.helpers.plants import TRAIN_STEP, Plant
from tests.helpers.ranks import rank_environments
from tests.helpers.runs import assert_same_run, read_json

pytestmark = pytest.mark.faults
STEPS = ["--steps", 30, "--log-every", 10, "--lr", 0.003]


@pytest.fixture
def ranks(train):
    """ranks(count, *arguments) -> the results of that many ranks of one run. plants: {rank: its
    Plants}; own: {rank: its further arguments}; codes: their exit codes, each 0 if not given."""
    def run(count, *arguments, plants=None, own=None, codes=None):
        plants, own = plants or {}, own or {}
        started = [train.start(*arguments, *own.get(rank, ()), plants=plants.get(rank, ()), env=env)
                   for rank, env in enumerate(rank_environments(count))]
        results = [process.wait() for process in started]
        assert [result.returncode for result in results] == (codes or [0] * count), results
        return results
    return run


def torchrun(count, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
         "--standalone", "train.py", *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# The relative difference between one process and several, measured over three seeds and five
# settings: losses up to 8e-7; the first gradient (of Adam's first moment after one step) up to
# 5e-8 without BatchNorm and 1e-6 with; weights after thirty steps up to 1.3e-5, because Adam
# divides by the root of a gradient's square. With the BatchNorm statistics of each rank's slice
# instead of the batch's, the three are 1e-3, 0.2 and 0.4.
LOSSES, GRADIENTS, WEIGHTS = 5e-6, 5e-6, 5e-5


def assert_same_numbers(one, other):
    """Losses of all rows, weights, running statistics and Adam's moments at the end. Steps,
    accuracies and counts are exact."""
    for a, b in zip(read_csv(one / "log.csv"), read_csv(other / "log.csv"), strict=True):
        assert a["step"] == b["step"]
        assert (a["train_acc"], a["val_acc"]) == (b["train_acc"], b["val_acc"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=LOSSES)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=LOSSES)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    assert a["state"]["confusion"] == b["state"]["confusion"]
    for name, tensor in a["state_dict"].items():
        difference = (tensor - b["state_dict"][name]).double().norm()
        assert difference <= WEIGHTS * tensor.double().norm(), name
    gradients, others = (
        torch.cat([state["exp_avg"].flatten() for state in c["optimizer"]["state"].values()])
        for c in (a, b))
    tolerance = GRADIENTS if a["state"]["step"] == 1 else WEIGHTS
    assert (gradients - others).norm() <= tolerance * gradients.norm()


@pytest.mark.parametrize("model, count, batch", [
    pytest.param(TINY_VIT, 3, 8, id="uneven slices"),
    pytest.param([*TINY_VIT, "--val-fraction", 0.25], 2, 9, id="last batch of one image"),
])
def test_as_one_process_with_the_same_batch(ranks, train, pictures, tmp_path, model, count, batch):
    arguments = [*model, *STEPS, "--amp", "off", "--batch-size", batch, "--data", pictures]

    def train_both(name, *more):
        """(folder of one process, folder of several, results of the several)."""
        one, several = tmp_path / name, tmp_path / f"{name} of several"
        succeeded(train(*arguments, *more, "--out", one))
        results = ranks(count, *arguments, *more, "--out", several)
        assert_same_numbers(one, several)
        return one, several, results
    train_both("the first gradient", "--steps", 1)
    one, several, results = train_both("thirty steps")
    assert results[1].stdout == "" and all(result.stderr == "" for result in results)
    assert f"in {count} processes" in results[0].stdout
    train_both("weights that rank 0 alone loads", "--steps", 10, "--init-from", one / "last.pt")

    # the files
    environment, split, summary = (read_json(several / f"{name}.json")
                                   for name in ("environment", "split", "summary"))
    assert environment["processes"] == count
    assert (one / "split.json").read_text() == (several / "split.json").read_text()
    assert sum(map(sum, summary["confusion"])) == len(split["val"]), "each validation image once"


def test_batchnorm_of_each_rank_is_another_run(ranks, train, pictures, tmp_path):
    """The statistics are of each rank's slice: the measure above must see it."""
    arguments = [*TINY, *STEPS, "--data", pictures]
    succeeded(train(*arguments, "--out", tmp_path / "one"))
    ranks(2, *arguments, "--out", tmp_path / "two")
    with pytest.raises(AssertionError):
        assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_stopped_and_resumed_in_two_ranks_is_the_same_run(ranks, pictures, tmp_path):
    """Bit for bit. The signal reaches one of them, and both stop at the end of the interval."""
    arguments = [*TINY, *STEPS, "--data", pictures, "--schedule", "cosine", "--resume", "auto"]
    ranks(2, *arguments, "--out", tmp_path / "whole")
    moments = [(1, TRAIN_STEP, 14, 20), (0, "mixer.training.evaluate.to_float", 1, 10)]
    for i, (rank, moment, call, step) in enumerate(moments):
        out = tmp_path / f"cut{i}"
        plants = {rank: [Plant(moment, signal.SIGTERM, call)]}
        first, second = ranks(2, *arguments, "--out", out, plants=plants, codes=[143, 143])
        assert first.stderr.startswith(f"stopped by SIGTERM at step {step}; continue with")
        assert first.stderr.count("\n") == 1 and second.stderr == ""
        ranks(2, *arguments, "--out", out)
        assert_same_run(tmp_path / "whole", out)


def test_resumed_with_another_number_of_ranks(ranks, train, pictures, tmp_path):
    """One, then two, then three, then one: data order, augmentation and log are those of one."""
    arguments = [*TINY_VIT, *STEPS, "--amp", "off", "--data", pictures, "--resume", "auto"]
    succeeded(train(*arguments, "--out", tmp_path / "one"))
    for count, step in ((1, 7), (2, 6), (3, 9)):
        plants = {0: [Plant(TRAIN_STEP, signal.SIGTERM, step)]}
        ranks(count, *arguments, "--out", tmp_path / "mixed", plants=plants, codes=[143] * count)
    ranks(1, *arguments, "--out", tmp_path / "mixed")
    assert_same_numbers(tmp_path / "one", tmp_path / "mixed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(ranks, pictures, out, rank):
    """With an error, not with a hang. What was saved before is whole."""
    results = ranks(2, *TINY, *STEPS, "--data", pictures, "--out", out,
                    plants={rank: [Plant(TRAIN_STEP, signal.SIGKILL, 15)]},
                    codes=[-signal.SIGKILL if each == rank else 1 for each in range(2)])
    other = results[1 - rank].stderr
    assert other.startswith("error") and other.count("\n") == 1
    assert load_checkpoint(out / "last.pt")["state"]["step"] == 10


def test_each_rank_needs_an_image_of_a_batch(ranks, pictures, out):
    results = ranks(3, *TINY, "--steps", 1, "--data", pictures, "--batch-size", 2, "--out", out,
                    codes=[2] * 3)
    assert "must be at least 3 (ranks) and at most 36 (training images)" in results[0].stderr


def test_ranks_that_see_other_images_are_refused(ranks, pictures, out, tmp_path):
    """As on a machine whose copy of the data is not the same."""
    other = shutil.copytree(pictures, tmp_path / pictures.name)
    (other / "cat.1.png").unlink()
    results = ranks(2, *TINY, "--steps", 1, "--out", out, codes=[1, 2],
                    own={0: ["--data", pictures], 1: ["--data", other]})
    assert "on rank 1 differ from those on rank 0" in results[1].stderr


def test_torchrun_stopped_stops_its_workers_saved(pictures, out, tmp_path):
    arguments = [*TINY, "--log-every", 100, "--lr", 0.003, "--data", pictures, "--steps", 100_000,
                 "--out", out, "--resume", "auto", "--cache", tmp_path / "cache"]
    process = torchrun(2, *arguments)
    assert any(line.startswith("step   100") for line in process.stdout), process.communicate()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS)
    assert err.count("stopped by SIGTERM at step") == 1, err
    step = load_checkpoint(out / "last.pt")["state"]["step"]
    assert step >= 100 and step % 100 == 0  # 100: the signal came before the ranks had agreed
    assert f"stopped by SIGTERM at step {step};" in err


def test_several_rows_in_one_torchrun(pictures, tmp_path):
    """The ranks of the second row find each other, not those of the first."""
    process = torchrun(2, "--arch", "all", "--rows", "convmixer-p24,convmixer-p16", "--steps", 2,
                       "--data", pictures, "--image-size", 48, "--batch-size", 4, "--device", "cpu",
                       "--out", tmp_path / "all", "--cache", tmp_path / "cache")
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, (out, err)
    assert out.count("in 2 processes") == 2 and "2 of 2 runs done" in out


