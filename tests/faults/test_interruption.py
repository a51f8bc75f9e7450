"""Signals, Ctrl-C and kill -9 at chosen and at random moments: nothing is lost, and the finished
run is the same run."""
import random
import signal

import pytest

from tests.helpers.commands import EXIT_CODES, HANGS, SHORT, succeeded, wait_until
from tests.helpers.plants import TRAIN_STEP, Hang, Plant
from tests.helpers.runs import assert_same_run, assert_whole_files

MOMENTS = {  # in the loop: the function that is called then, and the number of the call
    "a step": (TRAIN_STEP, 8),
    "evaluating": ("mixer.training.evaluate.to_float", 3),
    "saving": ("os.fsync", 8),
    "renaming": ("os.replace", 9),
    "between checkpoint and log": ("mixer.training.trainer.write_csv", 1),
}
# each moment with one signal, and in the campaign with the others
MOMENTS_AND_SIGNALS = [
    pytest.param(moment, signum, id=f"{moment}-{signum.name}",
                 marks=[] if i % len(EXIT_CODES) == j else [pytest.mark.campaign])
    for i, moment in enumerate(MOMENTS) for j, signum in enumerate(EXIT_CODES)]


@pytest.mark.parametrize("moment, signum", MOMENTS_AND_SIGNALS)
def test_a_signal_at_a_chosen_moment_of_the_loop(train, pictures, tmp_path, out, whole,
                                                 moment, signum):
    """Exit code 128 + n, one line, all saved; and the resumed run is the whole run."""
    where, call = MOMENTS[moment]
    arguments = [*SHORT, "--data", pictures, "--out", out, "--resume", "auto"]
    assert_stopped(train(*arguments, plants=[Plant(where, signum, call)]), signum)
    assert_whole_files(out)
    assert not list(tmp_path.rglob("*.tmp*"))
    assert "resumed at step" in succeeded(train(*arguments)).stdout
    assert_same_run(whole, out)


@pytest.mark.parametrize("where", [
    "mixer.models.create_model", "os.pwrite", "mixer.report.runs.summarise"])
def test_a_signal_outside_the_loop_ends_the_process(train, pictures, out, whole, where):
    arguments = [*SHORT, "--data", pictures, "--out", out, "--resume", "auto"]
    result = train(*arguments, plants=[Plant(where, signal.SIGTERM)])
    assert result.returncode == -signal.SIGTERM and result.stderr == ""
    assert_whole_files(out)
    succeeded(train(*arguments))
    assert_same_run(whole, out)


def assert_stopped(result, signum):
    assert result.returncode == EXIT_CODES[signum], (result.stdout, result.stderr)
    assert result.stderr.startswith(f"stopped by {signum.name} at step"), result.stderr
    assert "--resume auto" in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_second_ctrl_c_leaves_at_once(train, pictures, out, whole):
    """The first is for after the step, which hangs."""
    arguments = [*SHORT, "--data", pictures, "--out", out, "--resume", "auto"]
    process = train.start(*arguments, plants=[Hang(step=31)]).wait_for("hanging")
    process.send(signal.SIGINT)
    before = process.output().count("hanging")
    wait_until(lambda: process.output().count("hanging") > before + 1)  # it is still there
    process.send(signal.SIGINT)
    assert process.wait().returncode == 130
    assert_whole_files(out)
    succeeded(train(*arguments))
    assert_same_run(whole, out)


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.campaign)])
def test_killed_at_random_moments(train, pictures, tmp_path, whole, tally, count):
    """kill -9, resume, kill -9, ...: at every death all files are whole, and each run that gets to
    its end is the whole run."""
    lost = []

    def check(process, out, signum):
        try:
            assert_whole_files(out)
        except (AssertionError, ValueError) as e:
            lost.append(e)
    kills = stop_and_resume(train, pictures, tmp_path, whole, [signal.SIGKILL], count, check)
    tally("kill -9 at a random moment of a run", kills, kills - len(lost))


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.campaign)])
def test_signals_at_random_moments(train, pictures, tmp_path, whole, tally, count):
    def check(process, out, signum):
        if process.code() not in (-signum, 130):  # the loop had ended
            assert_stopped(process.wait(), signum)
        assert_whole_files(out)
    sent = stop_and_resume(train, pictures, tmp_path, whole, list(EXIT_CODES), count, check)
    tally("SIGTERM, Ctrl-C, SIGHUP or SIGUSR1 at a random moment of a run", sent, sent)


def stop_and_resume(train, pictures, tmp_path, whole, signals, count, check):
    """Stop runs after a moment by a random signal, at least `count` times; resume each of them
    until it ends, as the run `whole`. check(process, folder, signal) comes after each signal.
    Returns how many signals were sent."""
    rng, sent, finished = random.Random(5), 0, 0
    while sent < count or not finished:
        out = tmp_path / f"run{finished}"
        while True:
            process = train.start(*SHORT, "--data", pictures, "--out", out, "--resume", "auto",
                                  "--cache", tmp_path / f"cache{finished}")
            signum = rng.choice(signals)
            if signum != signal.SIGKILL:
                process.wait_until_it_listens()
            pause = rng.choice([rng.uniform(0, 0.2), rng.uniform(0, 0.6), HANGS])
            if process.ends_within(pause if sent < count else HANGS):
                break
            process.send(signum)
            if process.wait().returncode == 0:  # it was done in the meantime
                break
            sent += 1
            check(process, out, signum)
        succeeded(process.wait())
        assert_same_run(whole, out)
        finished += 1
    return sent


def test_arch_all_stopped_and_resumed(train, pictures, tmp_path):
    """The signal goes to the row that runs, which saves; the next call goes on with it."""
    arguments = ["--arch", "all", "--rows", "convmixer-p24,convmixer-p16", "--data", pictures,
                 "--image-size", 48, "--batch-size", 4, "--device", "cpu", "--log-every", 1,
                 "--out", tmp_path / "all", "--resume", "auto", "--steps", 100_000]
    process = train.start(*arguments).wait_for("\nstep     2")
    process.send(signal.SIGTERM)
    result = process.wait()
    assert result.returncode == 143
    assert "stopped by SIGTERM in ConvMixer 16" not in result.stderr, "it went on"
    row, command = result.stderr.splitlines()
    assert row.startswith("stopped by SIGTERM at step ")
    assert command.startswith("stopped by SIGTERM in ConvMixer 24; continue with the same command")
    assert (tmp_path / "all" / "table.md").exists()
    process.wait_for_its_children()
    process = train.start(*arguments).wait_for("\nresumed at step")
    process.send(signal.SIGINT)
    assert process.wait().returncode == 130
