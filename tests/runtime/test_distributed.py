"""Several ranks train one run: the numbers of one process, one writer, one end for all. torchrun
starts them where its own part matters, otherwise its environment variables do."""
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from mixer.models.weights import load_checkpoint
from mixer.runtime.files import read_csv
from tests.helpers.commands import HANGS, ROOT, TINY
from tests.helpers.plants import TRAIN_STEP, Plant
from tests.helpers.ranks import rank_environments
from tests.helpers.runs import assert_same_run

pytestmark = pytest.mark.faults
VIT = ["--arch", "vit_linear", "--patch", 8, "--dim", 16, "--heads", 2, "--depth", 1,
       "--image-size", 32, "--batch-size", 8, "--device", "cpu"]
STEPS = ["--steps", 30, "--log-every", 10, "--lr", 0.003]


@pytest.fixture
def ranks(train):
    """ranks(count, *arguments) -> the results of that many ranks of one run. plants: {rank: its
    Plants}; own: {rank: its further arguments}."""
    def run(count, *arguments, plants=None, own=None):
        plants, own = plants or {}, own or {}
        started = [train.start(*arguments, *own.get(rank, ()), plants=plants.get(rank, ()), env=env)
                   for rank, env in enumerate(rank_environments(count))]
        return [process.wait() for process in started]
    return run


def exit_codes(results):
    return [result.returncode for result in results]


def torchrun(count, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
         "--standalone", "train.py", *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_line(process, start):
    assert any(line.startswith(start) for line in process.stdout), process.communicate()


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
    pytest.param(VIT, 3, 8, id="uneven slices"),
    pytest.param([*VIT, "--val-fraction", 0.25], 2, 9, id="last batch of one image"),
])
def test_as_one_process_with_the_same_batch(ranks, train, pictures, tmp_path, model, count, batch):
    arguments = [*model, *STEPS, "--amp", "off", "--batch-size", batch, "--data", pictures]
    first, several_first, one, several = (
        tmp_path / name for name in ("first", "first of several", "one", "several"))

    # the first gradient
    assert train(*arguments, "--steps", 1, "--out", first).returncode == 0
    results = ranks(count, *arguments, "--steps", 1, "--out", several_first)
    assert exit_codes(results) == [0] * count, results
    assert_same_numbers(first, several_first)

    # thirty steps
    assert train(*arguments, "--out", one).returncode == 0
    results = ranks(count, *arguments, "--out", several)
    assert exit_codes(results) == [0] * count, results
    assert results[1].stdout == "" and all(result.stderr == "" for result in results)
    assert f"in {count} processes" in results[0].stdout
    assert_same_numbers(one, several)

    # from weights that rank 0 alone loads
    arguments += ["--steps", 10, "--init-from", one / "last.pt"]
    started, several_started = tmp_path / "started", tmp_path / "several started"
    assert train(*arguments, "--out", started).returncode == 0
    assert exit_codes(ranks(count, *arguments, "--out", several_started)) == [0] * count
    assert_same_numbers(started, several_started)

    # the files
    environment, split, summary = (json.loads((several / f"{name}.json").read_text())
                                   for name in ("environment", "split", "summary"))
    assert environment["processes"] == count
    assert (one / "split.json").read_text() == (several / "split.json").read_text()
    assert sum(map(sum, summary["confusion"])) == len(split["val"]), "each validation image once"


def test_batchnorm_of_each_rank_is_another_run(ranks, train, pictures, tmp_path):
    """The statistics are of each rank's slice: the measure above must see it."""
    arguments = [*TINY, *STEPS, "--data", pictures]
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    assert exit_codes(ranks(2, *arguments, "--out", tmp_path / "two")) == [0, 0]
    with pytest.raises(AssertionError):
        assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_stopped_and_resumed_in_two_ranks_is_the_same_run(ranks, pictures, tmp_path):
    """Bit for bit. The signal reaches one of them, and both stop at the end of the interval."""
    arguments = [*TINY, *STEPS, "--data", pictures, "--schedule", "cosine", "--resume", "auto"]
    assert exit_codes(ranks(2, *arguments, "--out", tmp_path / "whole")) == [0, 0]
    moments = [(1, TRAIN_STEP, 14, 20), (0, "mixer.training.evaluate.to_float", 1, 10)]
    for i, (rank, moment, call, step) in enumerate(moments):
        out = tmp_path / f"cut{i}"
        plants = {rank: [Plant(moment, signal.SIGTERM, call)]}
        first, second = results = ranks(2, *arguments, "--out", out, plants=plants)
        assert exit_codes(results) == [143, 143], results
        assert first.stderr.startswith(f"stopped by SIGTERM at step {step}; continue with")
        assert first.stderr.count("\n") == 1 and second.stderr == ""
        assert exit_codes(ranks(2, *arguments, "--out", out)) == [0, 0]
        assert_same_run(tmp_path / "whole", out)


def test_resumed_with_another_number_of_ranks(ranks, train, pictures, tmp_path):
    """One, then two, then three, then one: data order, augmentation and log are those of one."""
    arguments = [*VIT, *STEPS, "--amp", "off", "--data", pictures, "--resume", "auto"]
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    for count, step in ((1, 7), (2, 6), (3, 9)):
        plants = {0: [Plant(TRAIN_STEP, signal.SIGTERM, step)]}
        results = ranks(count, *arguments, "--out", tmp_path / "mixed", plants=plants)
        assert exit_codes(results) == [143] * count
    assert exit_codes(ranks(1, *arguments, "--out", tmp_path / "mixed")) == [0]
    assert_same_numbers(tmp_path / "one", tmp_path / "mixed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(ranks, pictures, tmp_path, rank):
    """With an error, not with a hang. What was saved before is whole."""
    results = ranks(2, *TINY, *STEPS, "--data", pictures, "--out", tmp_path / "run",
                    plants={rank: [Plant(TRAIN_STEP, signal.SIGKILL, 15)]})
    died, other = results[rank], results[1 - rank]
    assert died.returncode == -signal.SIGKILL and other.returncode == 1
    assert other.stderr.startswith("error") and other.stderr.count("\n") == 1
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["state"]["step"] == 10


def test_each_rank_needs_an_image_of_a_batch(ranks, pictures, tmp_path):
    results = ranks(3, *TINY, "--steps", 1, "--data", pictures, "--batch-size", 2,
                    "--out", tmp_path / "run")
    assert exit_codes(results) == [2] * 3
    assert "must be at least 3 (ranks) and at most 36 (training images)" in results[0].stderr


def test_ranks_that_see_other_images_are_refused(ranks, pictures, tmp_path):
    """As on a machine whose copy of the data is not the same."""
    other = shutil.copytree(pictures, tmp_path / pictures.name)
    (other / "cat.1.png").unlink()
    first, second = ranks(2, *TINY, "--steps", 1, "--out", tmp_path / "run",
                          own={0: ["--data", pictures], 1: ["--data", other]})
    assert second.returncode == 2 and "on rank 1 differ from those on rank 0" in second.stderr
    assert first.returncode == 1


def test_torchrun_stopped_stops_its_workers_saved(pictures, tmp_path):
    arguments = [*TINY, "--log-every", 100, "--lr", 0.003, "--data", pictures, "--steps", 100_000,
                 "--out", tmp_path / "run", "--resume", "auto", "--cache", tmp_path / "cache"]
    process = torchrun(2, *arguments)
    wait_for_line(process, "step   100")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS)
    assert err.count("stopped by SIGTERM at step") == 1, err
    step = load_checkpoint(tmp_path / "run" / "last.pt")["state"]["step"]
    assert step >= 100 and step % 100 == 0  # 100: the signal came before the ranks had agreed
    assert f"stopped by SIGTERM at step {step};" in err


def test_several_rows_in_one_torchrun(pictures, tmp_path):
    """The ranks of the second row find each other, not those of the first."""
    process = torchrun(2, "--arch", "all", "--rows", "convmixer-p24,convmixer-p16", "--steps", 2,
                       "--data", pictures, "--image-size", 48, "--batch-size", 4, "--device", "cpu",
                       "--out", tmp_path / "all", "--cache", tmp_path / "cache")
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert out.count("in 2 processes") == 2 and "2 of 2 runs done" in out


