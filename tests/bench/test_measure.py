"""Counts against the design's figures, times on a clock of our own, memory of a known size."""
import math
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import fuse
from mixer.bench import measure
from mixer.runtime import processes
from mixer.data.images import find_images
from mixer.runtime.errors import InputError
from mixer.experiments import ROWS
from mixer.bench.measure import Load, compare_training, count_model, forward_flops, inference_step, largest, largest_batch, race_training, saved_bytes, time_model, times_and_floor, training_memory, training_step
from mixer.bench.data import measure_data
from mixer.models import create_model
from mixer.runtime.processes import ChildFailed, in_fresh_process

CPU = torch.device("cpu")
# of an independent count: forward GFLOP an image; MiB saved an image in float32, eager, attention as two matrix products
COUNTED = {"ResNet-18": (2.66, 15.5), "EfficientNetV2-B0": (1.05, 42.6), "ViT 24 Linear": (1.78, 9.3), "ViT 24 CNN": (1.78, 9.3),
           "ConvMixer 24": (0.27, 3.7), "ViT 16 Linear": (3.93, 21.7), "ViT 16 CNN": (3.93, 21.7), "ConvMixer 16": (0.46, 7.7),
           "ConvMixer 16/8": (0.81, 14.5)}


def small(batch=2, size=24, amp=None):
    return Load(batch, size, CPU, amp)


def tiny():
    return create_model("convmixer", dim=8, depth=1, patch=12, image_size=24)


def broken():
    raise ValueError("no such model")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_flops_and_saved_bytes_are_those_counted_elsewhere(row):
    gflop, saved_mib = COUNTED[row.title]
    model = create_model(row.arch, **row.options)
    assert forward_flops(model, 192) / 1e9 == pytest.approx(gflop, rel=0.01)
    images, labels = torch.rand(2, 3, 192, 192), torch.tensor([0, 1])

    def saved():
        return saved_bytes(lambda: F.cross_entropy(model.train()(images), labels)) / len(images) / 2**20
    with sdpa_kernel(SDPBackend.MATH):
        assert saved() == pytest.approx(saved_mib, rel=0.02)
    if "ViT" in row.title:  # PyTorch's fused attention does not keep the attention matrix
        assert 0.8 < saved() / saved_mib < 0.95
    if row.arch == "convmixer":
        unfused = saved()
        fuse(model)
        assert forward_flops(model, 192) / 1e9 == pytest.approx(gflop, rel=0.01)
        assert saved() < 0.75 * unfused


def test_counting_flops_leaves_the_model_alone():
    model = tiny().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    forward_flops(model, 24)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_saved_bytes_are_whole_storages_once_without_parameters_and_their_casts():
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8, 8))
    assert saved_bytes(lambda: x @ weight) == 4 * 8 * 4
    assert saved_bytes(lambda: (x @ weight).exp()) == 2 * 4 * 8 * 4  # exp keeps its result
    assert saved_bytes(lambda: x[:1] * x[1:2]) == 4 * 8 * 4  # two views of one storage, kept whole
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(lambda: F.linear(x, weight)) == 4 * 8 * 2  # the cast activation, not the cast weight


def test_a_slower_model_is_seen_as_slower(monkeypatch):
    """On a clock of our own, where a forward in training takes one unit or three, in eval half of it, a copy 0.1 and a product 0.2."""
    now = [0.0]

    class Slowed(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.layer = seconds, nn.Linear(12, 2)

        def forward(self, x):
            now[0] += self.seconds * (1.0 if self.training else 0.5)
            return self.layer(x.mean((2, 3)).repeat(1, 4))

    class Best:
        def __init__(self, device, dtype):
            self.bytes, self.flops = 10**6, 10**6
            self.ways = {"copy": partial(self.take, 0.1), "matmul": partial(self.take, 0.2)}

        def take(self, seconds):
            now[0] += seconds
    monkeypatch.setattr(measure, "Ceiling", Best)
    rows = []
    for seconds in (1.0, 3.0):
        counts = {"batch_size": 2, **count_model(lambda: Slowed(seconds), small())}
        assert counts["parameters"] == 26 and counts["gflop_per_image"] == pytest.approx(2 * 12 * 2 / 1e9)
        times = time_model(lambda: Slowed(seconds), small(), 3, clock=lambda: now[0])
        assert {what: len(ms) for what, ms in times.items()} == dict.fromkeys(("training", "inference", "gflop", "gb"), 3)
        rows.append({**counts, **times_and_floor(counts, times)})
    for row, seconds in zip(rows, (1, 3)):
        assert row["training_ms"] == row["training_p20"] == pytest.approx(1000 * seconds)
        assert row["inference_ms"] == pytest.approx(500 * seconds) and row["inference_images_per_s"] == pytest.approx(4 / seconds)
        assert row["training_images_per_s"] == pytest.approx(2 / seconds)
        assert row["seconds_per_25000_images"] == pytest.approx(12_500 * seconds)
        flops, moved = 3 * 2 * 12 * 2 * 2, 2 * row["saved_mib_per_image"] * 2 * 2**20 + 32 * 26
        assert row["share_of_floor"] == pytest.approx(max(flops * 0.2, moved * 0.1) / 10**6 / seconds)
        assert row["matmul_gflop_s"] == pytest.approx(0.005) and row["copy_gb_s"] == pytest.approx(0.01)


def test_steps_train_and_infer():
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    inference_step(model, small())()
    assert not model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    training_step(model, small())()
    assert model.training and not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


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
    rows = [training_memory(lambda: big(megabytes), small(), [2])[0] for megabytes in (1, 200)]
    return [row["process_mib"] for row in rows]


def test_memory_counts_weights_gradients_and_both_moments():
    """200 MB of weights take four times that, whatever else a process needs; the margin is one more copy's half."""
    before, after = in_fresh_process(two_sizes)
    assert (after - before) * 2**20 / 200e6 == pytest.approx(4, abs=0.5)


def test_a_failing_way_is_told_and_the_others_are_measured(monkeypatch):
    rows = race_training({"ours": tiny, "broken": broken, "again": tiny}, small(), 3)
    assert [set(row) for row in rows] == [{"way", "ms", "p20", "p80", "faster"}, {"way", "failed"}, {"way", "ms", "p20", "p80", "faster"}]
    assert race_training({"broken": broken, "ours": tiny}, small(), 3)[1]["faster"] is None  # than what?
    assert rows[0]["faster"] == 1 and rows[1]["failed"] == "ValueError: no such model"

    def in_this_process(f, *args):
        if f is training_memory:
            raise ChildFailed("out of memory: all of it")
        return f(*args)
    monkeypatch.setattr(processes, "in_fresh_process", in_this_process)
    rows = compare_training({"ours": tiny, "broken": broken}, small(), 3)
    assert [row["failed"] for row in rows] == ["out of memory: all of it", "ValueError: no such model"]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 37, 64, 250, 999])
def test_the_largest_batch_is_found_in_few_tries(limit):
    tries = []
    assert largest(lambda batch: tries.append(batch) or batch <= limit) == (limit if limit >= 2 else 0)
    assert len(tries) == len(set(tries)) <= 2 * math.log2(max(limit, 2)) + 2


def test_the_largest_batch_within_a_budget(monkeypatch):
    """A card of 80 GB of which a context holds 1 GB, and steps of 0.1 GB an image, as PyTorch's own limit would end them."""
    fraction = []

    def step_of(model, load):
        def step():
            if load.batch_size * 0.1e9 > fraction[0] * 80e9:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step
    monkeypatch.setattr(measure, "training_step", step_of)
    for name, fake in {"mem_get_info": lambda device: (79_000_000_000, 80_000_000_000), "memory_reserved": lambda device: 0,
                       "set_per_process_memory_fraction": lambda share, device: fraction.append(share),
                       "synchronize": lambda device: None, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert largest_batch(tiny, small(), 8_000_000_000) == 70
    assert fraction == [7 / 80]


def test_data_stages(tmp_path):
    for i in range(6):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{'cat' if i % 2 else 'dog'}.{i}.jpg")
    rows = measure_data(tmp_path, small(), 3, most=4)
    assert [row["stage"] for row in rows] == ["decoding, one process", "packing, all cores", "reading a batch", "augmenting it"]
    assert all(0 < row["p20"] <= row["images_per_s"] <= row["p80"] for row in rows)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no image")
    assert find_images(tmp_path)
    with pytest.raises(InputError, match="none of 6 images"):
        measure_data(tmp_path, small(), 3)
