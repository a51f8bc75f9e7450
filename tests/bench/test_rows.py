"""The rows visited in turn, and peers beside them."""
import importlib.util
from types import SimpleNamespace

import torch

from mixer.bench import measure, rows, timing
from mixer.bench.candidates import build
from mixer.bench.measure import Load, time_training, training_memory
from mixer.experiments import Row
from tests.helpers.networks import IMAGE_SIZE, TINY

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(repeats=7, image_size=[IMAGE_SIZE], kernels="auto", compile=False)
CONVMIXER = Row("ConvMixer 24", "convmixer", options=TINY)
LINEAR = Row("ViT 24 Linear", "vit_linear", options=TINY)


def test_rows_are_visited_in_turn_and_a_late_failure_counts(monkeypatch):
    visits = []

    def visit(f, make, load, repeats):
        visits.append((make.args[0].title, repeats))
        if len(visits) == 4:
            return None, "out of memory: all of it"
        return f(make, load, repeats), None
    monkeypatch.setattr(rows, "attempt", visit)
    monkeypatch.setattr(timing, "COPY_FLOATS", 2**10)
    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 16})
    models = rows.measure_rows(CONFIG, [CONVMIXER, LINEAR], Load(8, IMAGE_SIZE, CPU, None))
    assert visits == [(title, 2) for title in (
        "ConvMixer 24", "ViT 24 Linear", "ConvMixer 24", "ViT 24 Linear", "ConvMixer 24")]
    assert models[0]["training_ms"] > 0 and "failed" not in models[0]
    assert models[1] == {"row": "ViT 24 Linear", "image_size": IMAGE_SIZE, "batch_size": 8,
                         "failed": "out of memory: all of it"}


def test_compare_with_peers_in_turn(monkeypatch):
    runs = []

    def peer(row, image_size, device, compile):
        return build(row, image_size, device, "torch", False)

    def in_this_process(f, make, load, *args):
        if f is training_memory:
            return {"training_mib": 200.0 if make.func is build else 100.0}, None
        if f is time_training:
            runs.append((make.func is build, load.amp, args))
        return f(make, load, *args), None
    for module in (rows, measure):
        monkeypatch.setattr(module, "attempt", in_this_process)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(rows, "build_peer", peer)
    load = Load(2, IMAGE_SIZE, CPU, torch.bfloat16)
    assert rows.measure_peers(CONFIG, LINEAR, load) == []
    measured = rows.measure_peers(CONFIG, CONVMIXER, load)
    assert [(row["row"], row["way"]) for row in measured] == [
        ("ConvMixer 24", way) for way in ("ours", "timm", "timm, compiled", "timm, plain fp32")]
    ours, peer, _, as_users = measured
    assert (ours["faster"], ours["memory_ratio"], peer["memory_ratio"]) == (1, 1, 2)
    assert peer["faster"] > 0 and as_users["faster"] > 0 and "memory_ratio" not in as_users
    assert runs == 3 * [(True, torch.bfloat16, (2, True)), (False, None, (2, False))]
