"""Counts against the design's figures, times on a clock of our own, memory of a known size."""
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import fuse
from mixer.bench import measure, timing
from mixer.bench.measure import measure_in_turn, measure_memory, saved_bytes, time_models
from mixer.experiments import ROWS
from mixer.models import create_model, vit
from mixer.models.flops import forward_flops
from mixer.runtime.processes import in_fresh_process
from tests.helpers.networks import IMAGE_SIZE, tiny_convmixer

WORKLOAD = measure.Workload(2, IMAGE_SIZE, torch.device("cpu"), None)
# of an independent count: forward GFLOP per image; MiB saved per image in float32, eager, attention
# as two matrix products
COUNTED = {"ResNet-18": (2.66, 15.5), "EfficientNetV2-B0": (1.05, 42.6),
           "ViT 24 Linear": (1.78, 9.3), "ViT 24 CNN": (1.78, 9.3), "ConvMixer 24": (0.27, 3.7),
           "ViT 16 Linear": (3.93, 21.7), "ViT 16 CNN": (3.93, 21.7), "ConvMixer 16": (0.46, 7.7),
           "ConvMixer 16/8": (0.81, 14.5), "MLP-Mixer 24": (1.32, 10.55),
           "MLP-Mixer 16": (2.83, 18.21)}


@pytest.fixture
def memory_grows(monkeypatch):
    mib = itertools.count(1)
    monkeypatch.setattr(measure, "peak_memory_mib", lambda device: next(mib))


def broken():
    raise ValueError("no such model")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_flops_and_saved_bytes_are_those_counted_elsewhere(row, monkeypatch):
    monkeypatch.setattr(vit, "FEW_TOKENS", 0)  # SDPA on every CPU
    gflop, saved_mib = COUNTED[row.title]
    model = create_model(row.arch, **row.options)
    assert forward_flops(model, 192) / 1e9 == pytest.approx(gflop, rel=0.01)
    images, labels = torch.rand(2, 3, 192, 192), torch.tensor([0, 1])

    def saved():
        total = saved_bytes(lambda: F.cross_entropy(model.train()(images), labels))
        return total / len(images) / 2**20
    with sdpa_kernel(SDPBackend.MATH):
        assert saved() == pytest.approx(saved_mib, rel=0.02)
    if "ViT" in row.title:  # PyTorch's fused attention does not keep the attention matrix
        assert 0.8 < saved() / saved_mib < 0.95
    if row.arch == "convmixer":
        unfused = saved()
        fuse(model)
        assert forward_flops(model, 192) / 1e9 == pytest.approx(gflop, rel=0.01)
        assert saved() < 0.75 * unfused


def test_saved_bytes_are_whole_storages_once_without_parameters_and_their_casts():
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8, 8))
    assert saved_bytes(lambda: x @ weight) == 4 * 8 * 4
    assert saved_bytes(lambda: (x @ weight).exp()) == 2 * 4 * 8 * 4  # exp keeps its result
    assert saved_bytes(lambda: x[:1] * x[1:2]) == 4 * 8 * 4  # two views of one storage, kept whole
    with torch.autocast("cpu", torch.bfloat16):
        # the cast activation, not the cast weight
        assert saved_bytes(lambda: F.linear(x, weight)) == 4 * 8 * 2


def test_a_slower_model_is_seen_as_slower(memory_grows, monkeypatch):
    """On a clock of our own, in seconds: a forward pass in training takes 1 or 3, in eval mode half
    of it."""
    now, visits = [0.0], []

    class Slowed(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.layer = seconds, nn.Linear(12, 2)

        def forward(self, x):
            now[0] += self.seconds * (1.0 if self.training else 0.5)
            return self.layer(x.mean((2, 3)).repeat(1, 4))

    def visit(f, *args):
        visits.append(f)
        return f(*args), None
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "in_fresh_process", visit)
    fast, slow = measure_in_turn([(WORKLOAD, {
        ("a model", IMAGE_SIZE, seconds): partial(Slowed, seconds) for seconds in (1.0, 3.0)})], 9)
    assert visits == 2 * [measure_memory] + 3 * [time_models]
    assert fast["parameters"] == 26
    assert fast["gflop_per_image"] == pytest.approx(2 * 12 * 2 / 1e9)
    for row, seconds in ((fast, 1.0), (slow, 3.0)):
        assert row["training_ms"] == row["training_p20"] == pytest.approx(1000 * seconds)
        assert row["inference_ms"] == pytest.approx(500 * seconds)
        assert row["inference_images_per_s"] == pytest.approx(4 / seconds)
        assert row["training_images_per_s"] == pytest.approx(2 / seconds)
        assert row["seconds_per_25000_images"] == pytest.approx(12_500 * seconds)
        assert row["faster"] == pytest.approx(1 / seconds)


def test_steps_train_and_infer():
    model = tiny_convmixer()
    before = [p.clone() for p in model.parameters()]
    steps = measure.model_steps(model, WORKLOAD)
    steps["inference"]()
    assert not model.training
    assert all(map(torch.equal, before, model.parameters()))
    steps["training"]()
    assert model.training and not all(map(torch.equal, before, model.parameters()))


def big(megabytes):
    """A model with so many MB of weights, each used."""
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, megabytes * 125_000))

        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] * self.weight.sum(1)
    return Big()


def two_sizes():
    return [measure_memory(partial(big, megabytes), WORKLOAD) for megabytes in (1, 200)]


@pytest.mark.faults
def test_memory_counts_weights_gradients_and_both_moments_and_no_imports():
    """200 MB of weights take four times that; the margin is half of one more copy. A first
    optimizer imports 70 MiB; the margin is half of them."""
    (small, large), _ = in_fresh_process(two_sizes)
    grown = large["process_mib"] - small["process_mib"]
    assert grown * 2**20 / 200e6 == pytest.approx(4, abs=0.5)
    assert small["training_mib"] < 35


def test_a_model_that_fails_is_reported_and_the_others_are_measured(memory_grows, monkeypatch):
    """At once or late; what is compared to one that failed has no ratio."""
    times = []

    def in_this_process(f, models, *args):
        if f is time_models and ("late", IMAGE_SIZE, 0) in models:
            times.append(1)
            if len(times) == 2:
                return None, "out of memory: all of it"
        return (None, "no such model") if models is broken else (f(models, *args), None)
    monkeypatch.setattr(measure, "in_fresh_process", in_this_process)
    groups = [("a", (tiny_convmixer, broken, tiny_convmixer)), ("b", (broken, tiny_convmixer)),
              ("c", (broken,)), ("late", (tiny_convmixer,))]
    ours, failing, again, _, without, _, late = measure_in_turn([(WORKLOAD, {
        (name, IMAGE_SIZE, i): make for i, make in enumerate(makes)}) for name, makes in groups], 3)
    assert failing == {"row": "a", "candidate": 1, "image_size": IMAGE_SIZE, "batch_size": 2,
                       "failed": "no such model"}
    assert ours["training_ms"] > 0 and ours["faster"] == ours["memory_ratio"] == 1
    assert again["training_ms"] > 0 and again["faster"] > 0
    assert without["training_ms"] > 0 and "faster" not in without
    assert late["failed"] == "out of memory: all of it" and "training_ms" not in late
