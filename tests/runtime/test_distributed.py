"""Several processes train one run: the same numbers as one process with the same batch, one writer, one end for all.

Ranks are started by torchrun where its own part matters, else as it would start them, by RANK, WORLD_SIZE and MASTER_PORT.
"""
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.commands import HANGS, ROOT, TINY, Plant, same_run

from mixer.runtime.checkpoint import load_checkpoint
from mixer.data.batches import Stream
from mixer.runtime.distributed import World
from mixer.runtime.files import read_csv

VIT = ["--arch", "vit_linear", "--patch", 8, "--dim", 16, "--heads", 2, "--depth", 1, "--image-size", 32, "--batch-size", 8, "--device", "cpu"]
STEPS = ["--steps", 30, "--log-every", 10, "--lr", 0.003]


def environments(count):
    """What torchrun puts into the environment of each of `count` processes."""
    while True:
        port = random.randrange(20_000, 32_000)  # below those that the system gives to whoever asks for any
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            break
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@pytest.fixture
def ranks(train):
    """ranks(count, *arguments) -> that many processes of one run, finished. plants and own: {rank: its Plants}, {rank: its further arguments}."""
    def run(count, *arguments, plants={}, own={}):
        started = [train.start(*arguments, *own.get(rank, ()), plants=plants.get(rank, ()), env=env)
                   for rank, env in enumerate(environments(count))]
        return [process.wait() for process in started]
    return run


def torchrun(count, *arguments, script="train.py", options=()):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone", *options,
                             script, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# What one process and several may differ by, relative, measured over three seeds and five settings: losses up to 8e-7, the first
# gradient (of Adam's first moment after one step) up to 5e-8 without BatchNorm and 1e-6 with, weights after thirty steps up to 1.3e-5,
# for Adam divides by the root of a gradient's square. Statistics of each process's part instead of the batch: 1e-3, 0.2 and 0.4.
LOSSES, GRADIENTS, WEIGHTS = 5e-6, 5e-6, 5e-5


def assert_same_numbers(one, other):
    """Losses of all rows, weights, running statistics and Adam's moments at the end; exact are steps, accuracies and counts."""
    for a, b in zip(read_csv(one / "log.csv"), read_csv(other / "log.csv"), strict=True):
        assert a["step"] == b["step"] and (a["train_acc"], a["val_acc"]) == (b["train_acc"], b["val_acc"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=LOSSES) and a["val_loss"] == pytest.approx(b["val_loss"], rel=LOSSES)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    assert a["state"]["confusion"] == b["state"]["confusion"]
    for name, tensor in a["state_dict"].items():
        assert (tensor - b["state_dict"][name]).double().norm() <= WEIGHTS * tensor.double().norm(), name
    gradients, others = (torch.cat([s["exp_avg"].flatten() for s in c["optimizer"]["state"].values()]) for c in (a, b))
    assert (gradients - others).norm() <= (GRADIENTS if a["state"]["step"] == 1 else WEIGHTS) * gradients.norm()


@pytest.mark.parametrize("model, count, batch", [
    pytest.param(VIT, 2, 8, id="no BatchNorm"),
    pytest.param(VIT, 3, 8, id="uneven"),
    pytest.param([*VIT, "--val-fraction", 0.25], 2, 9, id="last batch of one image"),
    pytest.param([*TINY, "--sync-bn"], 2, 8, id="sync-bn, fused"),
    pytest.param([*TINY, "--sync-bn"], 2, 7, id="sync-bn, fused, uneven"),
    pytest.param([*TINY, "--sync-bn", "--kernels", "torch"], 3, 8, id="sync-bn, plain, uneven"),
])
def test_as_one_process_with_the_same_batch(ranks, train, pictures, tmp_path, model, count, batch):
    arguments = [*model, *STEPS, "--batch-size", batch, "--data", pictures]
    for folder, start in (("first", lambda *a: [train(*a)]), ("first of several", lambda *a: ranks(count, *a))):
        assert {r.returncode for r in start(*arguments, "--steps", 1, "--out", tmp_path / folder)} == {0}
    assert_same_numbers(tmp_path / "first", tmp_path / "first of several")
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    results = ranks(count, *arguments, "--out", tmp_path / "several")
    assert [r.returncode for r in results] == [0] * count, results
    assert results[1].stdout == "" and all(r.stderr == "" for r in results) and f"in {count} processes" in results[0].stdout
    assert_same_numbers(tmp_path / "one", tmp_path / "several")
    assert json.loads((tmp_path / "several" / "environment.json").read_text())["processes"] == count
    assert (tmp_path / "one" / "split.json").read_text() == (tmp_path / "several" / "split.json").read_text()
    split, summary = (json.loads((tmp_path / "several" / f"{name}.json").read_text()) for name in ("split", "summary"))
    assert sum(map(sum, summary["confusion"])) == len(split["val"]), "each validation image once"


def test_batchnorm_of_each_process_is_another_run(ranks, train, pictures, tmp_path):
    """Without --sync-bn the statistics are of each process's part: the measure above must see that."""
    arguments = [*TINY, *STEPS, "--data", pictures]
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    assert [r.returncode for r in ranks(2, *arguments, "--out", tmp_path / "two")] == [0, 0]
    with pytest.raises(AssertionError):
        assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_every_sample_once_and_in_the_same_order_whatever_the_number_of_processes():
    stream = Stream(37, 10, seed=3)
    for size in (1, 2, 3, 10):
        for step in (0, 5, 17):
            parts = [World(rank, size).batch_slice(stream.batch(step)[1]) for rank in range(size)]
            assert (np.concatenate(parts) == stream.batch(step)[1]).all() and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_stopped_and_resumed_in_two_processes_is_the_same_run(ranks, pictures, tmp_path):
    """Bit for bit; the signal reaches one of them, and both stop at the same step. Then with other numbers of processes."""
    arguments = [*TINY, *STEPS, "--data", pictures, "--schedule", "cosine", "--resume", "auto"]
    assert [r.returncode for r in ranks(2, *arguments, "--out", tmp_path / "whole")] == [0, 0]
    for i, (moment, call) in enumerate([("mixer.training.trainer.train_step", 14), ("mixer.training.recipe.to_float", 2), ("os.fsync", 9)]):
        rank = 0 if moment == "os.fsync" else 1
        out = tmp_path / f"cut{i}"
        results = ranks(2, *arguments, "--out", out, plants={rank: [Plant(moment, signal.SIGTERM, call)]})
        assert [r.returncode for r in results] == [143, 143], results
        assert results[0].stderr.startswith("stopped by SIGTERM at step") and results[0].stderr.count("\n") == 1 and results[1].stderr == ""
        assert [r.returncode for r in ranks(2, *arguments, "--out", out)] == [0, 0]
        same_run(tmp_path / "whole", out)


def test_resumed_with_another_number_of_processes(ranks, train, pictures, tmp_path):
    """One, then two, then three, then one: data order, augmentation and log are those of one process throughout."""
    arguments = [*VIT, *STEPS, "--data", pictures, "--resume", "auto"]
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    for count, stop in ((1, 7), (2, 6), (3, 9), (1, None)):
        plants = {0: [Plant("mixer.training.trainer.train_step", signal.SIGTERM, stop)]} if stop else {}
        assert {r.returncode for r in ranks(count, *arguments, "--out", tmp_path / "mixed", plants=plants)} == {143 if stop else 0}
    assert_same_numbers(tmp_path / "one", tmp_path / "mixed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(ranks, pictures, tmp_path, rank):
    """With its error, not with a hang; what was saved before is whole."""
    results = ranks(2, *TINY, *STEPS, "--data", pictures, "--out", tmp_path / "run", plants={rank: [Plant("mixer.training.trainer.train_step", signal.SIGKILL, 15)]})
    assert results[rank].returncode == -signal.SIGKILL and results[1 - rank].returncode == 1
    assert re.fullmatch(r"error(?: \(rank 1\))?: another process of this run is gone, and may have said why; --resume auto .*\n",
                        results[1 - rank].stderr), results[1 - rank].stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt", whole=True)["state"]["step"] == 10


def test_an_error_is_told_once_or_by_the_rank_that_has_it(ranks, pictures, tmp_path):
    results = ranks(2, "--batch", 3, "--lr", "nan")
    assert [r.returncode for r in results] == [2, 2] and results[0].stderr.count("\n") == 2 and results[1].stderr == ""
    results = ranks(2, *TINY, "--steps", 1, "--batch-size", 2, "--data", pictures, "--out", tmp_path / "run")
    assert [r.returncode for r in results] == [2, 2] and "take at least 4, or --sync-bn" in results[0].stderr
    results = ranks(9, *TINY, "--steps", 1, "--batch-size", 8, "--data", pictures, "--out", tmp_path / "run")
    assert {r.returncode for r in results} == {2} and "less than an image for each of the 9 processes" in results[0].stderr
    alone = ranks(2, *TINY, "--steps", 1, "--data", pictures, "--device", "cuda:0")
    assert all("--device cuda:0: 2 processes cannot share a GPU" in r.stderr for r in alone) and "(rank 1)" in alone[1].stderr
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    results = ranks(2, *TINY, "--steps", 1, "--data", pictures, "--out", tmp_path / "taken")
    assert results[0].returncode == 2 and "holds another run" in results[0].stderr and results[1].returncode == 1


def test_ranks_that_see_other_images_are_refused(ranks, pictures, tmp_path):
    """As on a node whose copy of the data is not the same."""
    import shutil
    other = shutil.copytree(pictures, tmp_path / pictures.name)
    (other / "cat.1.png").unlink()
    first, second = ranks(2, *TINY, "--steps", 1, "--out", tmp_path / "run", own={0: ["--data", pictures], 1: ["--data", other]})
    assert second.returncode == 2 and "process 1 finds other images" in second.stderr and first.returncode == 1


def test_a_signal_while_the_others_have_not_come(train, pictures, tmp_path):
    process = train.start(*TINY, "--data", pictures, "--out", tmp_path / "run", env=environments(2)[0]).wait_for("device: cpu")
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    result = process.wait()
    assert (result.returncode, result.stderr) == (143, "stopped by SIGTERM\n") and not (tmp_path / "run").exists()


def test_half_a_torchrun_is_refused(train, pictures, tmp_path):
    result = train(*TINY, "--data", pictures, "--out", tmp_path / "run", env={"RANK": "0", "WORLD_SIZE": "2"})
    assert result.returncode == 2 and "start with torchrun, or unset them" in result.stderr and result.stderr.count("\n") == 1
    assert train(*TINY, "--data", pictures, "--steps", 1, "--out", tmp_path / "run", env={"RANK": "x", "WORLD_SIZE": ""}).returncode == 0


def test_torchrun_trains(pictures, tmp_path):
    """The README's command, on two processes; then a SIGTERM to torchrun itself, which passes it on, and the rest."""
    arguments = [*TINY, "--log-every", 100, "--lr", 0.003, "--data", pictures, "--out", tmp_path / "run", "--resume", "auto", "--cache", tmp_path / "cache"]
    process = torchrun(2, *arguments, "--steps", 100_000)
    for line in process.stdout:
        if line.startswith("step   100"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS)
    assert err.count("stopped by SIGTERM at step") == 1, err
    step = load_checkpoint(tmp_path / "run" / "last.pt", whole=True)["state"]["step"]
    assert step >= 100
    process = torchrun(2, *arguments, "--steps", step + 5)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and f"resumed at step {step}" in out.replace(",", "") and "in 2 processes" in out, err
    assert out.count("final val accuracy") == 1


def workers_of(torchrun):
    return sorted(pid for pid in map(int, Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split())
                  if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_torchrun_killed_leaves_none_behind(pictures, tmp_path):
    """Its processes stop, saved; else they would go on unseen, and hold GPUs and folder."""
    process = torchrun(2, *TINY, "--steps", 100_000, "--data", pictures, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    for line in process.stdout:
        if line.startswith("step   100"):
            break
    workers = workers_of(process)
    process.kill()
    _, err = process.communicate(timeout=HANGS)  # until all that hold its stdout are gone
    assert len(workers) == 2 and err.count("stopped by SIGTERM at step") == 1
    assert load_checkpoint(tmp_path / "run" / "last.pt", whole=True)["state"]["step"] >= 100


PLANTED = """
import os, runpy, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from tests.helpers.commands import Plant
call = {{("0", "1"): 15, ("1", "0"): 8}}.get((os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]))
if call:
    Plant("mixer.training.trainer.train_step", signal.SIGKILL, call).set()
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_torchrun_starts_again_what_died(ranks, pictures, tmp_path):
    """--max-restarts: each process in turn is killed, the others end, and all find each other again, not those that are gone."""
    arguments = [*TINY, *STEPS, "--data", pictures, "--resume", "auto", "--cache", tmp_path / "cache"]
    assert [r.returncode for r in ranks(2, *arguments, "--out", tmp_path / "whole")] == [0, 0]
    (tmp_path / "planted.py").write_text(PLANTED.format(root=str(ROOT)))
    process = torchrun(2, *arguments, "--out", tmp_path / "run", script=tmp_path / "planted.py",
                       options=["--max-restarts", "2", "--monitor-interval", "0.1"])
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and out.count("resumed at step 10") == 2, err
    same_run(tmp_path / "whole", tmp_path / "run")


def test_bench_is_for_one_process(command):
    result = command("bench.py", env={"RANK": "0", "WORLD_SIZE": "2"}).wait()
    assert result.returncode == 2 and "start it without torchrun" in result.stderr
