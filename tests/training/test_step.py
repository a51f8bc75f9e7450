from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kernels import depthwise_cpu, fuse
from mixer.experiments import ROWS
from mixer.models import MODELS, create_model
from mixer.runtime.distributed import World
from mixer.training.config import Config
from mixer.training.evaluate import evaluate
from mixer.training.trainer import learning_rate, make_optimizer, skipped_steps, train_step
from tests.helpers.networks import tiny_convmixer
from tests.helpers.training import NO_SCALER, SMALL, subsets


def test_train_step_is_plain_adam_on_the_cross_entropy():
    """Against torch.optim.Adam and the loss written out, in float64; three steps."""
    torch.manual_seed(0)
    ours, plain = (tiny_convmixer(dim=8).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, Config(lr=1e-3))
    reference = torch.optim.Adam(plain.parameters(), 1e-3)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    for _ in range(3):
        x = torch.rand(6, 3, 32, 32, dtype=torch.float64)
        logits = plain(x).float()  # the loss is taken in fp32, whatever the model computes in
        expected = -torch.log_softmax(logits, 1)[torch.arange(6), y].mean()
        reference.zero_grad()
        expected.backward()
        reference.step()
        loss, correct = train_step(ours, x, y, optimizer, NO_SCALER)
        assert loss.dtype == torch.float32 and torch.allclose(loss, expected)
        assert correct == (logits.argmax(1) == y).sum()
    assert skipped_steps(optimizer, 3) == 0
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # gradients of an fp32 loss


def test_clipping_smoothing_and_decay_do_what_they_say():
    torch.manual_seed(0)
    model = tiny_convmixer(dim=8)
    x, y = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 1, 0, 1, 0])

    logits = model(x)
    still = torch.optim.SGD(model.parameters(), 0.0)
    loss, _ = train_step(model, x, y, still, NO_SCALER, label_smoothing=0.2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, F.one_hot(y, 2) * 0.8 + 0.1))

    before = [p.detach().clone() for p in model.parameters()]
    plain = torch.optim.SGD(model.parameters(), 1.0)
    train_step(model, x, y, plain, NO_SCALER, clip_grad=0.01)
    moved = [(p - q).norm() for p, q in zip(model.parameters(), before, strict=True)]
    assert abs(torch.stack(moved).norm() - 0.01) < 1e-5

    weights, others = make_optimizer(model, Config(lr=1e-3, weight_decay=0.1)).param_groups
    assert {p.ndim > 1 for p in weights["params"]} == {True} and weights["weight_decay"] == 0.1
    assert {p.ndim > 1 for p in others["params"]} == {False} and others["weight_decay"] == 0


def loss_after_steps(row, amp=None, noise=None):
    """The loss of the third step of a small model of this row; fused as train.py does it. noise: a
    seed. Each module's output is multiplied by 1 + u, u uniform up to one rounding of bfloat16:
    float32 training that rounds as often as bfloat16 does."""
    torch.manual_seed(0)
    small = {"dim": 32, "heads": 4}.items()
    options = {**row.options, **{k: v for k, v in small if k in MODELS[row.arch].defaults}}
    model = create_model(row.arch, image_size=48, **options)
    if row.arch == "convmixer":
        fuse(model)
    x, y = torch.rand(8, 3, 48, 48), torch.arange(8) % 2
    generator = torch.Generator().manual_seed(noise or 0)
    rounding = torch.finfo(torch.bfloat16).eps / 2

    def rounded(module, inputs, output):
        u = 2 * torch.rand(output.shape, generator=generator) - 1
        return output * (1 + rounding * u)
    if noise is not None:
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(rounded)
    optimizer = make_optimizer(model, Config(lr=1e-4))
    for _ in range(3):
        loss, _ = train_step(model, x, y, optimizer, NO_SCALER, amp=amp)
    return loss.item()


@pytest.mark.filterwarnings("ignore:DepthwiseGELUBN calls its parts")  # they have the hooks
@pytest.mark.parametrize("native", [False, True], ids=["rounded at the end", "products in bf16"])
@pytest.mark.parametrize("row", {row.arch: row for row in ROWS}.values(), ids=lambda row: row.arch)
def test_bf16_trains_to_the_loss_of_fp32(row, native, monkeypatch):
    """As close as float32 training that is disturbed by one rounding a module: within four times
    the largest of six such differences, for bfloat16 also rounds weights and gradients."""
    if native and row.arch != "convmixer":
        pytest.skip("only the fused unit has two ways")
    monkeypatch.setattr(depthwise_cpu, "NATIVE_BF16", native)
    exact = loss_after_steps(row)
    moved = [abs(loss_after_steps(row, noise=seed) - exact) for seed in range(1, 7)]
    assert 0 < abs(loss_after_steps(row, torch.bfloat16) - exact) <= 4 * max(moved)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_counts_every_image_once(batch_size):
    _, val = subsets()
    model = tiny_convmixer(dim=8).eval()
    x, y = val.images[val.indices].permute(0, 3, 1, 2) / 255, val.labels[val.indices]
    with torch.no_grad():
        logits = model(x)
    options = dict(device=torch.device("cpu"), classes=2, world=World())
    loss, acc, confusion = evaluate(model, val, batch_size, **options)
    assert abs(loss - F.cross_entropy(logits, y).item()) < 1e-6  # fp32 sums of ten terms
    assert acc == (logits.argmax(1) == y).double().mean().item()
    assert confusion == [[((y == true) & (logits.argmax(1) == predicted)).sum()
                          for predicted in (0, 1)] for true in (0, 1)]


def test_learning_rate():
    constant = replace(SMALL, lr=1.0, warmup=4, steps=10)
    assert [learning_rate(s, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = replace(constant, schedule="cosine")
    assert learning_rate(4, cosine) == 1 and abs(learning_rate(7, cosine) - 0.5) < 1e-12
    assert learning_rate(9, cosine) < 0.1
