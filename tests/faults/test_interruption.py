"""Signals, Ctrl-C and kill -9 at chosen and at random moments: nothing is lost, and the finished run is the same run."""
import json
import os
import random
import signal
import time

import pytest
from tests.helpers.commands import TINY, Command, Plant, same_run, session_members, wait_until

from mixer.training import trainer as training
from mixer.runtime.checkpoint import load_checkpoint
from mixer.runtime.files import read_csv

SHORT = [*TINY, "--steps", 60, "--log-every", 5, "--lr", 0.003, "--schedule", "cosine", "--warmup", 5]
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of the uninterrupted run of SHORT."""
    root = tmp_path_factory.mktemp("whole")
    result = Command("train.py", [*SHORT, "--data", pictures, "--cache", root, "--out", root / "run"], root / "streams").wait()
    assert result.returncode == 0, result.stderr
    return root / "run"


def assert_whole_files(folder):
    """Every file under its final name is whole: checkpoints by their checksums, json and csv by their grammar."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            load_checkpoint(path, whole=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "log.csv":
            assert path.read_text().count("step") == 1
            steps = [row["step"] for row in read_csv(path)]
            assert steps == sorted(set(steps))
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


# what happens, and the function that is called then
MOMENTS = {
    "claiming the folder": "train.find_checkpoint", "looking for images": "train.find_images", "making the model": "train.create_model",
    "decoding": "mixer.data.packed.wait", "keeping what was decoded": "mixer.data.packed.write_json", "splitting": "train.split",
    "a step": "mixer.training.trainer.train_step", "evaluating": "mixer.training.recipe.to_float", "saving": "os.fsync",
    "renaming": "os.replace", "between checkpoint and log": "mixer.training.trainer.write_csv", "drawing": "train.draw_curves",
    "the summary": "train.summarise",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_a_chosen_moment(train, pictures, tmp_path, whole, moment, signum):
    """Exit code 143 or 130, one line that says so, nothing half-written, nobody left behind; and the resumed run is the whole run."""
    arguments = [*SHORT, "--data", pictures, "--out", tmp_path / "run", "--resume", "auto"]
    call = {"mixer.training.trainer.train_step": 8, "mixer.training.recipe.to_float": 3, "os.fsync": 8, "os.replace": 9}
    where = MOMENTS[moment]
    process = train.start(*arguments, plants=[Plant(_looked_up(where), signum, call.get(where, 1))])
    result = process.wait()
    assert result.returncode == SIGNALS[signum], (result.stdout, result.stderr)
    assert result.stderr.startswith(f"stopped by {signum.name}") and result.stderr.count("\n") == 1, result.stderr
    if moment in ("a step", "evaluating"):
        assert "--resume auto" in result.stderr and (tmp_path / "run" / "last.pt").exists()
    wait_until(lambda: not session_members(process.pid))
    assert_whole_files(tmp_path / "run")
    assert not list((tmp_path / "cache").rglob("*.tmp*"))
    assert train(*arguments).returncode == 0
    same_run(whole, tmp_path / "run")


def _looked_up(where):
    """train.py is run as a script, so what it imported by name is planted where it comes from."""
    homes = {"find_checkpoint": "mixer.training.resume", "find_images": "mixer.data.images", "create_model": "mixer.models", "split": "mixer.data.batches",
             "draw_curves": "mixer.report.figures", "summarise": "mixer.report.runs"}
    module, name = where.rsplit(".", 1)
    return f"{homes[name]}.{name}" if module == "train" else where


def test_a_signal_while_python_imports(train, tmp_path):
    """In a fresh Python, from our first line on; before it, Python itself is killed by the signal, as any program is."""
    for signum, code in SIGNALS.items():
        for i in range(9):
            process = train.start("--data", tmp_path, "--out", tmp_path / "run", fresh=True)
            wait_until(lambda: heard_by(process.pid))
            time.sleep(random.Random(code + i).uniform(0, 0.5))
            process.send(signum)
            result = process.wait()
            if "no images" not in result.stderr:  # else the signal came late, after the imports
                break
        assert (result.returncode, result.stdout) == (code, "") and result.stderr == f"stopped by {signum.name}\n"
    assert not (tmp_path / "run").exists()


def heard_by(pid):
    """Whether a command has run its first line: it leads a session of its own and handles SIGHUP, as Python does not by itself."""
    try:
        with open(f"/proc/{pid}/status") as f:
            caught = next(int(line.split()[1], 16) for line in f if line.startswith("SigCgt"))
        return os.getsid(pid) == pid and caught >> (signal.SIGHUP - 1) & 1
    except (OSError, StopIteration):  # it has ended meanwhile
        return False


class Hang:
    """Inside a command: step number `step` never ends."""

    def __init__(self, step):
        self.step = step

    def set(self):
        take_step, step = training.Trainer.take_step, self.step

        def hanging(self):
            while self.state.step == step:
                print("hanging", flush=True)
                time.sleep(0.1)
            take_step(self)
        training.Trainer.take_step = hanging


def test_a_second_ctrl_c_leaves_at_once(train, pictures, tmp_path, whole):
    """The first is for after the step, which hangs."""
    arguments = [*SHORT, "--data", pictures, "--out", tmp_path / "run", "--resume", "auto"]
    process = train.start(*arguments, plants=[Hang(30)]).wait_for("hanging")
    process.send(signal.SIGINT)
    said = process.said()
    wait_until(lambda: process.said().count("hanging") > said.count("hanging") + 1)  # it has heard the first, and is still there
    process.send(signal.SIGINT)
    assert process.wait().returncode == 130
    assert_whole_files(tmp_path / "run")
    assert train(*arguments).returncode == 0
    same_run(whole, tmp_path / "run")


def test_ignored_signals_stay_ignored(train, pictures, tmp_path):
    """As nohup and a shell's background jobs ask for."""
    process = train.start(*SHORT, "--data", pictures, "--out", tmp_path / "run", plants=[Plant("mixer.training.trainer.train_step", signal.SIGHUP, 3)],
                          ignored=[signal.SIGHUP])
    assert process.wait().returncode == 0


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.campaign)])
def test_killed_at_random_moments(train, pictures, tmp_path, whole, tally, count):
    """kill -9, resume, kill -9, ...: at every death all files are whole, and each run that gets to its end is the whole run."""
    rng, kills, finished, lost = random.Random(5), 0, 0, []
    while kills < count or not finished:
        out = tmp_path / f"run{finished}"
        arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", tmp_path / f"cache{finished}", "--resume", "auto"]
        while True:
            process = train.start(*arguments)
            pause = rng.choice([rng.uniform(0, 0.2), rng.uniform(0, 0.6), 60]) if kills < count else 60
            until = time.monotonic() + pause
            while process.code() is None and time.monotonic() < until:
                time.sleep(0.002)
            if process.code() is not None:
                break
            process.send(signal.SIGKILL)
            process.wait()
            kills += 1
            try:
                assert_whole_files(out)
            except (AssertionError, ValueError) as e:
                lost.append(e)
        result = process.wait()
        assert result.returncode == 0, result.stderr
        same_run(whole, out)
        finished += 1
    tally("kill -9 at a random moment of a run", kills, kills - len(lost))


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.campaign)])
def test_signals_at_random_moments(train, pictures, tmp_path, whole, tally, count):
    rng, sent, finished = random.Random(6), 0, 0
    while sent < count:
        out = tmp_path / f"run{finished}"
        arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", tmp_path / f"cache{finished}", "--resume", "auto"]
        while True:
            process, signum = train.start(*arguments), rng.choice(list(SIGNALS))
            wait_until(lambda: process.code() is not None or heard_by(process.pid))
            time.sleep(rng.uniform(0, 0.5))
            process.send(signum)
            result = process.wait()
            wait_until(lambda: not session_members(process.pid))  # the system takes a moment to bury what was killed
            if result.returncode == 0:  # it was done already
                break
            sent += 1
            assert result.returncode == SIGNALS[signum] and result.stderr.startswith(f"stopped by {signum.name}"), result.stderr
            assert result.stderr.count("\n") == 1 and (not out.exists() or not list(out.glob(".*.tmp*")))
            assert_whole_files(out)
        same_run(whole, out)
        finished += 1
    tally("SIGTERM, Ctrl-C or SIGHUP at a random moment of a run", sent, sent)


def test_killed_while_decoding_and_started_again_at_once(train, pictures, tmp_path, whole):
    """The decoders die with their command, and neither hold its folder nor write to what the next one makes."""
    arguments = [*SHORT, "--data", pictures, "--out", tmp_path / "run", "--resume", "auto", "--workers", 2]
    for _ in range(5):
        process = train.start(*arguments, plants=[Plant("mixer.data.images.decode", signal.SIGSTOP, 3)])  # decoders that hang
        wait_until(lambda: list(session_members(process.pid).values()).count("T") == 2)
        process.send(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        again = train(*arguments, plants=[Plant("mixer.training.trainer.train_step", signal.SIGKILL, 3)])
        assert again.returncode == -signal.SIGKILL, again.stderr
        wait_until(lambda: not session_members(process.pid))
        for path in (tmp_path / "cache").rglob("*.np*"):
            path.unlink()
    assert train(*arguments).returncode == 0
    same_run(whole, tmp_path / "run")


def test_arch_all_killed_and_resumed(train, pictures, tmp_path):
    """The row that was running dies with it, so that the next one does not find its folder taken."""
    arguments = ["--arch", "all", "--data", pictures, "--image-size", 48, "--batch-size", 4, "--steps", 100_000, "--device", "cpu",
                 "--out", tmp_path / "all", "--resume", "auto"]
    process = train.start(*arguments).wait_for("device: cpu\n40 images")
    process.send(signal.SIGKILL)
    process.wait()
    process = train.start(*arguments).wait_for("device: cpu\n40 images")
    assert "another process" not in process.said() + process.said(2)
    process.send(signal.SIGINT)
    result = process.wait()
    assert result.returncode == 130 and "stopped by SIGINT in ResNet-18; go on with --arch all" in result.stderr
    assert "failed" not in result.stderr and (tmp_path / "all" / "table.md").exists()
