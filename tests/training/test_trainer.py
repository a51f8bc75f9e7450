import math
import signal
from dataclasses import replace

import pytest
import torch

from mixer.models.flops import forward_flops
from mixer.models.weights import load_checkpoint
from mixer.runtime.errors import Diverged, Interrupted
from mixer.training import trainer as trainer_module
from mixer.training.config import Config
from mixer.training.trainer import make_optimizer, skipped_steps, train_step
from tests.helpers.networks import tiny_convmixer
from tests.helpers.plants import TRAIN_STEP, Explode, Plant
from tests.helpers.runs import assert_same_run, is_finite, read_rows
from tests.helpers.training import SMALL, trainer


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(fault): what happens in a training step of this process, until the end of the test."""
    monkeypatch.setattr(trainer_module, "train_step", train_step)  # comes back
    return lambda fault: fault.set(tmp_path / "planted")


def test_fit_learns_logs_and_saves(tmp_path):
    run = trainer(tmp_path, replace(SMALL, steps=60, log_every=20, lr=3e-3))
    state = run.fit()
    assert [row["step"] for row in state.log] == [20, 40, 60]
    assert state.log[-1]["val_acc"] >= 0.9 and state.log[-1]["train_loss"] < 0.3
    assert state.best["val_acc"] == max(row["val_acc"] for row in state.log)
    assert sum(map(sum, state.confusion)) == 10
    assert [int(row["step"]) for row in read_rows(tmp_path / "log.csv")] == [20, 40, 60]
    saved = load_checkpoint(tmp_path / "last.pt")["state_dict"]
    assert all(torch.equal(saved[name], t) for name, t in run.model.state_dict().items())
    assert load_checkpoint(tmp_path / "best.pt")["entry"] == state.best


def test_the_fields_of_a_checkpoint(tmp_path):
    """Other versions of the code resume from these names."""
    trainer(tmp_path).fit()
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert list(checkpoint) == ["state_dict", "description", "identity", "optimizer", "scaler",
                                "state"]
    assert list(checkpoint["state"]) == ["step", "log", "best", "confusion", "loss", "correct"]
    assert list(checkpoint["state"]["log"][0]) == [
        "step", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "images_per_s",
        "data_wait", "memory_mib", "skipped", "flops"]


def test_the_rate_is_that_of_the_steps_alone(tmp_path, monkeypatch):
    """On a clock of our own: a step takes 1 s, a validation 10, saving 100."""
    now = [0.0]

    def taking(seconds, function):
        def slower(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)
        return slower
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for name, seconds in (("train_step", 1), ("evaluate", 10), ("save_checkpoint", 100)):
        monkeypatch.setattr(trainer_module, name, taking(seconds, getattr(trainer_module, name)))
    run = trainer(tmp_path)
    log = run.fit().log
    assert [entry["images_per_s"] for entry in log] == [SMALL.batch_size] * 3
    step = 3 * forward_flops(run.model, 32) * SMALL.batch_size
    assert [entry["flops"] for entry in log] == [3 * step, 6 * step, 9 * step]


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_resume_equals_the_uninterrupted_run(tmp_path, amp, plant):
    """Stopped by a signal between two log entries."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    trainer(whole, amp=amp).fit()
    plant(Plant(TRAIN_STEP, signal.SIGUSR1, 4, after=True))
    with pytest.raises(Interrupted,
                       match="^stopped by SIGUSR1 at step 4; continue with --out=") as e:
        trainer(cut, amp=amp).fit()
    assert e.value.exit_code == 128 + signal.SIGUSR1
    again = trainer(cut, amp=amp)
    torch.nn.init.zeros_(again.model.head.weight)  # whatever it was before
    again.resume(load_checkpoint(cut / "last.pt"))
    assert again.state.step == 4
    again.fit()
    assert_same_run(whole, cut)


def test_a_run_goes_on_with_another_interval_and_with_fp16(tmp_path, plant):
    """At the step where it stopped no entry is due, though 4 is even: there is nothing to time."""
    plant(Plant(TRAIN_STEP, signal.SIGTERM, 4, after=True))
    with pytest.raises(Interrupted):
        trainer(tmp_path).fit()
    again = trainer(tmp_path, replace(SMALL, log_every=2), amp=torch.float16)
    again.resume(load_checkpoint(tmp_path / "last.pt"))
    log = again.fit().log
    assert [entry["step"] for entry in log] == [3, 6, 8, 9]
    assert all(entry["images_per_s"] > 0 for entry in log)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path, plant):
    plant(Explode(step=5))
    with pytest.raises(Diverged, match="between steps 3 and 6, with training loss nan, "):
        trainer(tmp_path).fit()
    assert is_finite(tmp_path / "last.pt") and is_finite(tmp_path / "best.pt")


def test_a_loss_scale_that_collapses(tmp_path):
    run = trainer(tmp_path)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2e-4, backoff_factor=0.5)
    run.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match="between steps 0 and 3, .* fp16 loss scale 2e-05: try"):
        run.fit()
    assert not (tmp_path / "last.pt").exists()


def test_training_loss_and_accuracy_are_means_over_images(tmp_path):
    run = trainer(tmp_path)
    run.state.step, run.state.loss, run.state.correct = 2, torch.tensor(24.0), torch.tensor(4)
    assert run.training_means() == (24 / (2 * SMALL.batch_size), 4 / (2 * SMALL.batch_size))


@pytest.mark.parametrize("make, skipped", [
    (lambda model: make_optimizer(model, Config(lr=1e-3)), 1),
    (lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9), 0)])  # counts no steps
def test_a_step_the_scaler_skips_is_counted(make, skipped):
    model, scaler = tiny_convmixer(), torch.amp.GradScaler("cpu")
    optimizer = make(model)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    for step in range(3):
        before = model.head.weight.detach().clone()
        train_step(model, x * (math.inf if step == 1 else 1), y, optimizer, scaler)
        assert torch.equal(before, model.head.weight) == (step == 1)
    assert skipped_steps(optimizer, 3) == skipped
