"""Runs that diverge, checkpoints that are damaged, foreign or hostile, folders that are taken: told in a line, nothing good lost."""
import json
import math
import pickle
import random
import resource
import shutil
import signal
from collections import Counter

import pytest
import torch
from tests.helpers.commands import TINY, forked, same_run

from mixer.training import trainer as training
from mixer.runtime.checkpoint import load_checkpoint, save_checkpoint
from mixer.runtime.errors import Diverged

RUN = [*TINY, "--steps", 40, "--log-every", 10, "--lr", 0.003]


@pytest.fixture
def run(train, pictures, tmp_path):
    """run(*arguments) -> train.py on the pictures, in the folder `run`."""
    return lambda *arguments, **options: train(*RUN, "--data", pictures, "--out", tmp_path / "run", *arguments, **options)


def one_line(result, code, *words):
    assert result.returncode == code, (result.stdout, result.stderr)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def finite(path):
    return all(t.isfinite().all() for t in load_checkpoint(path, whole=True)["state_dict"].values())


def test_a_loss_that_explodes(run, tmp_path):
    """Exit code 3 within a log interval, with the step; what was good before stays, and no word of success is said or written."""
    assert run("--steps", 20).returncode == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("last.pt", "best.pt")}
    (tmp_path / "run" / "summary.json").unlink()
    result = run("--steps", 40, "--resume", "auto", plants=[Explode(24)])
    one_line(result, 3, "the training loss is nan at step 25", f"the last good checkpoint is {tmp_path / 'run' / 'last.pt'}")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before and not (tmp_path / "run" / "summary.json").exists()
    assert "final" not in result.stdout and "step    30" not in result.stdout
    assert run("--steps", 40, "--resume", "auto").returncode == 0 and finite(tmp_path / "run" / "last.pt")


class Explode:
    """Inside a command: after step `step` a weight is not a number; after step `after` comes a SIGTERM."""

    def __init__(self, step, after=None):
        self.step, self.after = step, after

    def set(self):
        take_step, step, after = training.Trainer.take_step, self.step, self.after

        def exploding(self):
            take_step(self)
            if self.state.step == step:
                next(self.model.parameters()).data.fill_(math.nan)
            if self.state.step == after:
                signal.raise_signal(signal.SIGTERM)
        training.Trainer.take_step = exploding


@pytest.mark.parametrize("step, after", [(24, 26), (24, 24), (30, 30), (29, 30)])
def test_a_signal_after_an_explosion_saves_nothing(run, tmp_path, step, after):
    """Else the last good checkpoint would be lost to one that is not."""
    assert run("--steps", 20).returncode == 0
    one_line(run("--steps", 40, "--resume", "auto", plants=[Explode(step, after)]), 3, "at step")
    assert finite(tmp_path / "run" / "last.pt") and load_checkpoint(tmp_path / "run" / "last.pt")["state"]["step"] == 20


def test_an_explosion_in_the_last_step_is_no_success(run, tmp_path):
    for more in ([], ["--val-fraction", 0, "--out", tmp_path / "other"]):
        result = run(*more, plants=[Explode(40)])
        one_line(result, 3, "at step 40")
        assert "final" not in result.stdout


def test_a_loss_scale_that_collapses(tmp_path):
    """With a scaler on the CPU, since fp16 autocast needs a GPU."""
    from tests.training.test_trainer import SMALL, trainer
    run = trainer(tmp_path, SMALL)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2e-4, backoff_factor=0.5)
    run.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match="every step's gradients overflow in fp16, down to a loss scale of 2e-05, at step 3"):
        run.fit()
    assert not (tmp_path / "last.pt").exists()


def test_chance_after_a_third_gets_a_hint(run, train, pictures, tmp_path):
    result = run("--lr", 1e-9)
    assert result.stdout.count("hint: after a third of the run, validation accuracy 0.500 is not clearly above the 0.500") == 1
    part = result.stdout[result.stdout.index("step    10"):result.stdout.index("hint")]
    assert "step    20" in part and "step    30" not in part
    assert "hint" not in learned(train, tmp_path).stdout


def learned(train, tmp_path):
    """A run that is well above chance: four hundred drawings of one colour a class, forty of them for validation."""
    from PIL import Image
    data = tmp_path / "easy"
    data.mkdir()
    for i in range(400):
        Image.new("RGB", (8, 8), ((200, 0, 0), (0, 0, 200))[i % 2]).save(data / f"{('cat', 'dog')[i % 2]}.{i}.png")
    result = train(*TINY, "--lr", 0.01, "--steps", 60, "--log-every", 20, "--data", data, "--out", tmp_path / "learned")
    assert result.returncode == 0 and "final val accuracy 1.000" in result.stdout
    return result


def test_memory_that_runs_out_is_told_of(run, tmp_path):
    """In one line, with what it was for and what to change: a limit on this process stands for a machine that is too small."""
    with open("/proc/self/statm") as f:
        taken = int(f.read().split()[0]) * resource.getpagesize()
    result = run("--image-size", 4096, "--patch", 4, "--dim", 2048, "--batch-size", 8, limits={resource.RLIMIT_AS: taken + 8 * 2**30})
    one_line(result, 1, "out of memory on cpu at batch size 8 and 4096x4096 pixels", "MiB were taken", "a smaller --batch-size")


def test_memory_of_a_gpu_that_runs_out_is_told_of(monkeypatch, tmp_path):
    from tests.training.test_trainer import SMALL, trainer
    run = trainer(tmp_path, SMALL)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")
    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(RuntimeError, match="^out of memory on cpu at batch size 8 .* may fit$"):
        run.fit()


def test_the_same_command_gives_the_same_bits(run, tmp_path):
    assert run().returncode == 0 and run("--out", tmp_path / "again", "--workers", 1).returncode == 0
    same_run(tmp_path / "run", tmp_path / "again")


# checkpoints

class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_hostile_checkpoints_execute_nothing(run, tmp_path):
    evil, done = tmp_path / "evil.pt", tmp_path / "executed"
    assert run("--steps", 10).returncode == 0
    good = load_checkpoint(tmp_path / "run" / "last.pt")
    for contents in (Hostile(done), {**good, "identity": Hostile(done)}, {**good, "state": {**good["state"], "rows": [Hostile(done)]}}):
        torch.save(contents, evil)
        one_line(run("--resume", evil, "--out", tmp_path / "new"), 2, "evil.pt is not a readable checkpoint")
    evil.write_bytes(pickle.dumps(Hostile(done)))
    one_line(run("--resume", evil, "--out", tmp_path / "new"), 2, "evil.pt is not a readable checkpoint")
    assert not done.exists()


def test_a_resume_file_that_is_not_one(run, train, pictures, tmp_path):
    """Missing, cut, weights alone, of another model, other data, other settings: named, and nothing is touched."""
    out = tmp_path / "run"
    assert run().returncode == 0
    last = (out / "last.pt").read_bytes()

    def refused(*words, arguments=()):
        files = {path: path.read_bytes() for path in out.iterdir()}
        one_line(run("--steps", 50, "--resume", "auto", *arguments), 2, "--resume: ", *words)
        assert {path: path.read_bytes() for path in out.iterdir()} == files
    one_line(run("--resume", tmp_path / "none.pt", "--out", tmp_path / "new"), 2, "there is no checkpoint", "none.pt")
    refused("lr is 0.003 there and 0.1 here", arguments=["--lr", 0.1])
    (out / "last.pt").write_bytes(last[:len(last) // 2])
    refused("last.pt is not a readable checkpoint")
    shutil.copy(out / "best.pt", out / "last.pt")
    refused("holds weights, not the state of a run")
    for spoil, word in ((lambda c: c["state"].pop("step"), "does not fit this run"), (lambda c: c.pop("scaler"), "scaler"), (lambda c: c.update(state=[]), "does not fit"),
                        (lambda c: c["state_dict"].pop("head.bias"), "head.bias"), (lambda c: c.update(optimizer={}), "does not fit")):
        (out / "last.pt").write_bytes(last)
        contents = load_checkpoint(out / "last.pt")
        spoil(contents)
        save_checkpoint(out / "last.pt", contents)
        refused(word)
    (out / "last.pt").write_bytes(last)
    other = shutil.copytree(pictures, tmp_path / "pictures")
    (other / "cat.1.png").write_bytes((other / "cat.3.png").read_bytes())
    one_line(train(*RUN, "--data", other, "--out", out, "--resume", "auto", "--steps", 50), 2, "images is ")
    vit = ["--arch", "vit_cnn", "--patch", 8, "--dim", 16, "--heads", 2, "--depth", 1, "--image-size", 32, "--batch-size", 8, "--lr", 0.003,
           "--device", "cpu", "--log-every", 10, "--steps", 50]
    one_line(train(*vit, "--data", pictures, "--out", out, "--resume", "auto"), 2, "arch is 'convmixer' there and 'vit_cnn' here", "heads is None there and 2 here")


def damage_checkpoints(path, seeds, folder):
    """In a process of its own: flip, cut or splice a checkpoint once for each seed; it must be refused, or load as it was."""
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
            got = load_checkpoint(folder / "spoilt.pt", whole=True)
        except ValueError as e:
            assert "spoilt.pt is not a readable checkpoint" in str(e) or "holds a" in str(e)
            outcomes["refused"] += 1
        else:
            same = got.keys() == want.keys() and all(got["state_dict"][k].equal(want["state_dict"][k]) for k in want["state_dict"])
            outcomes["unharmed" if same and got["state"]["rows"] == want["state"]["rows"] else "lost"] += 1
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.mark.parametrize("count", [600, pytest.param(30_000, marks=pytest.mark.campaign)])
def test_damaged_checkpoints_are_refused_or_unharmed(run, tmp_path, tally, count):
    assert run("--steps", 10).returncode == 0
    process = forked(damage_checkpoints, tmp_path / "run" / "last.pt", range(count), tmp_path)
    process.join()
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert process.exitcode == 0 and outcomes["refused"] > count / 2, outcomes
    tally("damaged checkpoint refused or unharmed", count, outcomes["refused"] + outcomes.get("unharmed", 0))


def test_a_finished_run_says_so_and_changes_nothing(run, tmp_path):
    assert run().returncode == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    result = run("--resume", "auto")
    assert result.returncode == 0 and "is trained already, to step 40: nothing to do" in result.stdout
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir() if path.name != ".lock"} == before


def test_folders_that_are_taken_or_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("precious")
    for flag in ("--out", "--cache"):
        for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
            one_line(run("--out", tmp_path / "run", flag, path), 2, f"{flag}: cannot write to {path}")
    assert (tmp_path / "file").read_text() == "precious"
    assert run("--steps", 10).returncode == 0
    one_line(run(), 2, "holds another run", "--resume auto")
