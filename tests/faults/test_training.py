"""Runs that diverge, checkpoints that are damaged, foreign or hostile, folders that are taken:
refused in one line, and nothing good is lost."""
import json
import pickle
import random
import resource
import shutil
import signal
from collections import Counter

import pytest
import torch

from mixer.models.weights import load_checkpoint
from tests.helpers.commands import TINY, TINY_VIT, assert_error, forked, succeeded
from tests.helpers.plants import TRAIN_STEP, Explode, Plant
from tests.helpers.runs import is_finite, read_json

STEPS = ["--steps", 40, "--log-every", 10, "--lr", 0.003]


@pytest.fixture
def run(train, pictures, out):
    """run(*arguments) -> train.py on the pictures, in the folder `run`."""
    def run(*arguments, **options):
        return train(*TINY, *STEPS, "--data", pictures, "--out", out, *arguments, **options)
    return run


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.iterdir() if path.name != ".lock"}


def test_a_loss_that_explodes(run, out):
    """Exit code 3 within a log interval, with its steps; what was good before stays, and no word of
    success is printed or written."""
    succeeded(run("--steps", 20))
    before = {name: (out / name).read_bytes() for name in ("last.pt", "best.pt")}
    (out / "summary.json").unlink()
    result = run("--resume", "auto", plants=[Explode(step=4)])
    assert_error(result, 3, "between steps 20 and 30, with training loss nan",
                 f"the last good checkpoint is {out / 'last.pt'}")
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not (out / "summary.json").exists()
    assert "final" not in result.stdout and "step    30" not in result.stdout
    succeeded(run("--resume", "auto"))
    assert is_finite(out / "last.pt")


@pytest.mark.parametrize("explosion, sigterm", [(24, 26), (24, 24), (30, 30), (29, 30)])
def test_a_signal_after_an_explosion_saves_nothing(run, out, explosion, sigterm):
    """Else the last good checkpoint, of step 20, would be lost to one that is not."""
    succeeded(run("--steps", 20))
    plants = [Plant(TRAIN_STEP, signal.SIGTERM, sigterm - 20, after=True), Explode(explosion - 20)]
    assert_error(run("--resume", "auto", plants=plants), 3, "between steps 20 and")
    assert is_finite(out / "last.pt")
    assert load_checkpoint(out / "last.pt")["state"]["step"] == 20


def test_an_explosion_in_the_last_step_is_no_success(run, tmp_path):
    for more in ([], ["--val-fraction", 0, "--out", tmp_path / "other"]):
        result = run(*more, plants=[Explode(step=40)])
        assert_error(result, 3, "and 40, with")
        assert "final" not in result.stdout


def test_memory_that_runs_out_is_told_of(run):
    """In one line, with what to change: a limit on the process stands for a machine that is too
    small."""
    with open("/proc/self/statm") as f:
        taken = int(f.read().split()[0]) * resource.getpagesize()
    result = run("--image-size", 4096, "--patch", 4, "--dim", 2048, "--batch-size", 8,
                 limits={resource.RLIMIT_AS: taken + 8 * 2**30})
    assert_error(result, 1, "out of memory (", "allocate", "try a smaller --batch-size")


# checkpoints

class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_hostile_checkpoints_execute_nothing(run, out, tmp_path):
    succeeded(run("--steps", 10))
    good = load_checkpoint(out / "last.pt")
    path, hostile = tmp_path / "evil.pt", Hostile(tmp_path / "executed")

    def assert_refused():
        assert_error(run("--resume", path, "--out", tmp_path / "new"), 2,
                     "evil.pt is not a readable checkpoint")
    for evil in (hostile, {**good, "identity": hostile},
                 {**good, "state": {**good["state"], "log": [hostile]}}):
        torch.save(evil, path)
        assert_refused()
    path.write_bytes(pickle.dumps(hostile))
    assert_refused()
    assert not (tmp_path / "executed").exists()


def test_a_resume_file_that_is_not_one(run, train, pictures, out, tmp_path):
    """Missing, cut, weights alone, of another model, other data, other settings: named, and
    nothing is touched."""
    succeeded(run())
    last = (out / "last.pt").read_bytes()

    def assert_refused(*words, arguments=()):
        before = contents(out)
        assert_error(run("--steps", 50, "--resume", "auto", *arguments), 2, *words)
        assert contents(out) == before
    missing = run("--resume", tmp_path / "none.pt", "--out", tmp_path / "new")
    assert_error(missing, 2, "none.pt is not a readable checkpoint", "No such file")
    assert_refused("lr was 0.003 and is 0.1", arguments=["--lr", 0.1])
    (out / "last.pt").write_bytes(last[:len(last) // 2])
    assert_refused("last.pt is not a readable checkpoint")
    shutil.copy(out / "best.pt", out / "last.pt")
    assert_refused("holds only weights, not the state of a run")

    # other data, another model
    (out / "last.pt").write_bytes(last)
    other = shutil.copytree(pictures, tmp_path / "pictures")
    (other / "cat.1.png").write_bytes((other / "cat.3.png").read_bytes())
    assert_refused("images was ", arguments=["--data", other])
    result = train(*TINY_VIT, "--arch", "vit_cnn", *STEPS, "--data", pictures, "--out", out,
                   "--resume", "auto")
    assert_error(result, 2, "arch was 'convmixer' and is 'vit_cnn'", "heads was None and is 2")


def damage_checkpoints(path, seeds, folder):
    """Runs in a fresh process: flip, cut or splice a checkpoint once for each seed; it must be
    refused, or load as it was. Writes the counts to outcomes.json."""
    data, outcomes = path.read_bytes(), Counter()
    want = load_checkpoint(path)
    for seed in seeds:
        rng, spoilt = random.Random(seed), bytearray(data)
        at = rng.randrange(len(data))
        if seed % 3 == 0:
            spoilt[at] ^= 1 << rng.randrange(8)
        elif seed % 3 == 1:
            del spoilt[at:at + rng.choice([1, 64, len(data)])]
        else:
            spoilt[at:at + 64] = rng.randbytes(64)
        (folder / "spoilt.pt").write_bytes(spoilt)
        try:
            got = load_checkpoint(folder / "spoilt.pt")
        except ValueError as e:
            assert "spoilt.pt is not a readable checkpoint" in str(e) or "holds a" in str(e)
            outcomes["refused"] += 1
        else:
            outcomes["unharmed" if is_same(got, want) else "lost"] += 1
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def is_same(got, want):
    return (got.keys() == want.keys() and got["state"]["log"] == want["state"]["log"]
            and all(got["state_dict"][k].equal(want["state_dict"][k])
                    for k in want["state_dict"]))


@pytest.mark.parametrize("count", [600, pytest.param(30_000, marks=pytest.mark.campaign)])
def test_damaged_checkpoints_are_refused_or_unharmed(run, out, tmp_path, tally, count):
    succeeded(run("--steps", 10))
    process = forked(damage_checkpoints, out / "last.pt", range(count), tmp_path)
    process.join()
    outcomes = read_json(tmp_path / "outcomes.json")
    assert process.exitcode == 0 and outcomes["refused"] > count / 2, outcomes
    survived = outcomes["refused"] + outcomes.get("unharmed", 0)
    tally("damaged checkpoint refused or unharmed", count, survived)


# folders

def test_a_finished_run_says_so_and_changes_nothing(run, out):
    succeeded(run())
    before = contents(out)
    result = succeeded(run("--resume", "auto"))
    assert "is trained already, to step 40: nothing to do" in result.stdout
    assert contents(out) == before


def test_folders_that_are_taken_or_cannot_be(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    for flag in ("--out", "--cache"):
        for path in (file, file / "below", "/proc/nothing"):
            assert_error(run(flag, path), 2, f"{flag}: cannot write to {path}")
    assert file.read_text() == "precious"
    succeeded(run("--steps", 10))
    assert_error(run(), 2, "holds another run", "--resume auto")
