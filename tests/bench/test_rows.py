"""The nine rows visited in turn, and peers beside them."""
import importlib.util
from functools import partial
from types import SimpleNamespace

import torch

from mixer.bench import measure, rows, timing
from mixer.bench.candidates import build
from mixer.bench.measure import Load
from mixer.experiments import Row
from mixer.report.measurements import Memory
from mixer.runtime import processes
from mixer.runtime.processes import ChildFailed
from tests.helpers.networks import IMAGE_SIZE, TINY

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(repeats=7, image_size=IMAGE_SIZE, kernels="auto", compile=False,
                         debug=False)


def test_rows_are_visited_in_turn_and_a_late_failure_counts(monkeypatch):
    visits = []

    def visit(f, make, load, repeats, batches):
        visits.append((make.args[0], repeats, batches))
        if len(visits) == 4:
            raise ChildFailed("out of memory: all of it")
        return f(make, load, repeats, batches)
    monkeypatch.setattr(processes, "in_fresh_process", visit)
    monkeypatch.setattr(timing, "COPY_FLOATS", 2**10)
    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 16})
    candidates = {arch: partial(build, arch, TINY, IMAGE_SIZE, CPU, "auto", False)
                  for arch in ("convmixer", "vit_cnn")}
    models, memory = rows.measure_rows(CONFIG, candidates, Load(8, IMAGE_SIZE, CPU, None))
    assert visits == [("convmixer", 2, [2, 4, 8]), ("vit_cnn", 2, [2, 4, 8]),
                      ("convmixer", 2, []), ("vit_cnn", 2, []), ("convmixer", 2, [])]
    assert models[0].speed.training_ms > 0 and models[1].failed == "out of memory: all of it"
    assert [(m.row, m.batch_size) for m in memory] == [
        (arch, batch) for arch in ("convmixer", "vit_cnn") for batch in (2, 4, 8)]


def test_compare_with_peers_in_turn(monkeypatch):
    def peer(arch, options, image_size, device, compile):
        return build(arch, options, image_size, device, "torch", False)

    def memory(make, load, batches):
        return [Memory(200.0 if make.func is build else 100.0, None, None, 900.0, 700.0)]
    monkeypatch.setattr(processes, "in_fresh_process", lambda f, *args: f(*args))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(rows, "build_peer", peer)
    monkeypatch.setattr(measure, "training_memory", memory)
    measured = rows.measure_peers(CONFIG, [Row("ConvMixer 24", "convmixer", 2132, 11, TINY),
                                           Row("ViT 24 Linear", "vit_linear", 3604, 17, TINY)],
                                  Load(2, IMAGE_SIZE, CPU, None))
    assert [(m.row, m.way) for m in measured] == [
        ("ConvMixer 24", way) for way in ("ours", "timm", "timm, compiled",
                                          "timm, plain fp32")]
    ours, peer, _, as_users = measured
    assert as_users.time_ratio > 0 and as_users.memory_ratio is None
    assert ours.time_ratio is None and peer.time_ratio == peer.faster > 0
    assert peer.memory_ratio == 2.0
