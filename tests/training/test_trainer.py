import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixer.runtime.checkpoint import load_checkpoint
from mixer.training.config import Config
from mixer.data.batches import Subset
from mixer.runtime.errors import Diverged, InputError
from mixer.models import create_model
from mixer.training.trainer import Trainer
from mixer.training.recipe import applied_steps, evaluate, learning_rate, make_optimizer, train_step
from mixer.training.resume import find_checkpoint

CPU = torch.device("cpu")
SMALL = Config(arch="convmixer", image_size=32, batch_size=8, steps=9, log_every=3, lr=1e-3, seed=1)
OFF = torch.amp.GradScaler("cpu", enabled=False)


def parts(count=40):
    """Two classes that differ in which half is bright."""
    images = torch.randint(0, 128, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 2
    images[labels == 0, :16] += 100
    images[labels == 1, 16:] += 100
    rows = np.arange(count)
    return Subset(images, labels, rows[:-10]), Subset(images, labels, rows[-10:])


def trainer(out, config=SMALL, identity=None):
    torch.manual_seed(config.seed)
    model = create_model("convmixer", image_size=32, patch=8, dim=16, depth=1, kernel_size=3)
    return Trainer(model, *parts(), config, out, device=CPU, classes=2, identity=identity or {"lr": config.lr})


def test_fit_learns_logs_and_saves(tmp_path):
    run = trainer(tmp_path, replace(SMALL, steps=60, log_every=20, lr=3e-3))
    state = run.fit()
    assert [row["step"] for row in state.rows] == [20, 40, 60]
    assert state.rows[-1]["val_acc"] >= 0.9 and state.rows[-1]["train_loss"] < 0.3
    assert state.best["val_acc"] == max(row["val_acc"] for row in state.rows) and sum(map(sum, state.confusion)) == 10
    with open(tmp_path / "log.csv") as f:
        assert [int(row["step"]) for row in csv.DictReader(f)] == [20, 40, 60]
    saved = load_checkpoint(tmp_path / "last.pt")
    assert all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in run.model.state_dict().items())
    assert load_checkpoint(tmp_path / "best.pt")["row"] == state.best


def test_rows_cover_a_last_interval_of_any_length(tmp_path):
    assert [row["step"] for row in trainer(tmp_path, replace(SMALL, steps=7)).fit().rows] == [3, 6, 7]


def test_epochs_are_steps(tmp_path):
    assert trainer(tmp_path, replace(SMALL, epochs=2.0)).steps == math.ceil(2 * 30 / 8)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    class Stopped(Exception):
        pass

    def stop_at(run, step):
        take_step = run.take_step

        def stopping():
            if run.state.step == step:
                run.save()
                raise Stopped
            take_step()
        run.take_step = stopping
        with pytest.raises(Stopped):
            run.fit()

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = trainer(tmp_path / "a")
    whole.fit()
    stop_at(trainer(tmp_path / "b"), 4)  # between two rows
    again = trainer(tmp_path / "b")
    torch.nn.init.zeros_(again.model.head.weight)  # whatever it was before
    again.resume(find_checkpoint("auto", tmp_path / "b"))
    assert again.state.step == 4
    again.fit()
    a, b = load_checkpoint(tmp_path / "a" / "last.pt"), load_checkpoint(tmp_path / "b" / "last.pt")
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    timing = {"images_per_s", "data_wait", "memory_mib"}
    for one, other in zip(a["state"]["rows"], b["state"]["rows"], strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_resuming_another_run_is_refused(tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(InputError, match="is of another run: lr is 0.001 there and 0.1 here"):
        trainer(tmp_path, identity={"lr": 0.1}).resume(find_checkpoint("auto", tmp_path))
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        find_checkpoint("auto", tmp_path)
    with pytest.raises(InputError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "none.pt", tmp_path)
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint("auto", tmp_path / "new") is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path):
    run = trainer(tmp_path)
    take_step = run.take_step

    def poisoned():
        take_step()
        if run.state.step == 5:
            run.model.head.weight.data.fill_(math.nan)
    run.take_step = poisoned
    with pytest.raises(Diverged, match="training loss is nan at step 6"):
        run.fit()
    for name in ("last.pt", "best.pt"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(tmp_path / name)["state_dict"].values())


def test_train_step_is_plain_adam_on_the_cross_entropy():
    """Against torch.optim.Adam and the loss written out, in float64; three steps."""
    torch.manual_seed(0)
    ours, plain = (create_model("convmixer", image_size=32, patch=8, dim=8, depth=1, kernel_size=3).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer, reference = make_optimizer(ours, 1e-3), torch.optim.Adam(plain.parameters(), 1e-3)
    for step in range(3):
        x, y = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
        logits = plain(x).float()  # the loss is taken in fp32, whatever the model computes in
        expected = -torch.log_softmax(logits, 1)[torch.arange(6), y].mean()
        reference.zero_grad()
        expected.backward()
        reference.step()
        loss, correct = train_step(ours, x, y, optimizer, OFF)
        assert loss.dtype == torch.float32 and torch.allclose(loss, expected) and correct == (logits.argmax(1) == y).sum()
    assert applied_steps(optimizer) == 3
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # gradients come through an fp32 loss


def test_clipping_smoothing_and_decay_do_what_they_say():
    torch.manual_seed(0)
    model = create_model("convmixer", image_size=32, patch=8, dim=8, depth=1, kernel_size=3)
    x, y = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 1, 0, 1, 0])
    logits = model(x)
    loss, _ = train_step(model, x, y, torch.optim.SGD(model.parameters(), 0.0), OFF, label_smoothing=0.2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, F.one_hot(y, 2) * 0.8 + 0.1))
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, x, y, torch.optim.SGD(model.parameters(), 1.0), OFF, clip_grad=0.01)
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before)]).norm()
    assert abs(moved - 0.01) < 1e-5
    groups = make_optimizer(model, 1e-3, weight_decay=0.1).param_groups
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True} and groups[0]["weight_decay"] == 0.1
    assert {p.ndim > 1 for p in groups[1]["params"]} == {False} and groups[1]["weight_decay"] == 0


def test_bf16_autocast_takes_the_loss_in_fp32():
    model = create_model("vit_linear", image_size=32, patch=8, dim=16, depth=1, heads=2)
    loss, _ = train_step(model, torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), make_optimizer(model, 1e-3), OFF,
                         amp=torch.bfloat16)
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_step_the_scaler_skips_is_counted():
    model = create_model("vit_linear", image_size=32, patch=8, dim=16, depth=1, heads=2)
    scaler, optimizer = torch.amp.GradScaler("cpu"), make_optimizer(model, 1e-3)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    for step in range(3):
        before = model.head.weight.detach().clone()
        train_step(model, x * (math.inf if step == 1 else 1), y, optimizer, scaler)
        assert torch.equal(before, model.head.weight) == (step == 1)
    assert applied_steps(optimizer) == 2


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_counts_every_image_once(batch_size):
    _, val = parts()
    model = create_model("convmixer", image_size=32, patch=8, dim=8, depth=1, kernel_size=3).eval()
    x = val.images[val.indices].permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = model(x)
    y = val.labels[val.indices]
    loss, acc, confusion = evaluate(model, val, batch_size, CPU, classes=2)
    assert abs(loss - F.cross_entropy(logits, y).item()) < 1e-6  # fp32 sums of ten terms
    assert acc == (logits.argmax(1) == y).double().mean().item()
    for true in (0, 1):
        for predicted in (0, 1):
            assert confusion[true][predicted] == ((y == true) & (logits.argmax(1) == predicted)).sum()
    assert evaluate(model, val, batch_size, CPU, classes=2, stop=lambda: True) is None


def test_learning_rate():
    constant = replace(SMALL, lr=1.0, warmup=4)
    assert [learning_rate(s, constant, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = replace(constant, schedule="cosine")
    assert learning_rate(4, cosine, 10) == 1 and abs(learning_rate(7, cosine, 10) - 0.5) < 1e-12
    assert learning_rate(9, cosine, 10) < 0.1
