"""On real Dogs vs. Cats images: set DOGS_VS_CATS to a zip or folder of them (Kaggle's train.zip, PetImages, ...)."""
import hashlib
import os
import random
import signal
import time

import numpy as np
import pytest
from tests.helpers.commands import Plant, same_run

from mixer.runtime.checkpoint import load_checkpoint
from mixer.data.images import find_images
from mixer.data.packed import pack, usable

PATH = os.environ.get("DOGS_VS_CATS")
pytestmark = pytest.mark.skipif(not PATH, reason="DOGS_VS_CATS names no images")


def test_real_images_are_found_decoded_and_balanced(tmp_path):
    images = find_images(PATH)
    assert [name.lower() for name in images.classes] == ["cat", "dog"]
    start = time.perf_counter()
    array, faults = pack(images, 192, tmp_path)
    print(f"{len(images) / (time.perf_counter() - start):,.0f} images/s decoded")
    good = usable(images, faults, "skip", tmp_path / "bad.csv")
    assert len(good) > 0.99 * len(images)
    picks = np.random.default_rng(0).choice(good, 20, replace=False)
    for index in picks:
        assert (array[index] == images.load(index, 192)).all()
    assert 60 < array[picks].mean() < 180 and array[picks].std() > 30  # photographs, not blanks


@pytest.mark.parametrize("size, steps", [(96, 60), pytest.param(192, 150, marks=pytest.mark.campaign)])
def test_killed_and_resumed_on_real_images(train, tmp_path, record_property, size, steps):
    """Six times, at random moments, while decoding too; the weights are those of the uninterrupted run, to the last bit."""
    arguments = ["--arch", "convmixer", "--patch", 24, "--data", PATH, "--image-size", size, "--batch-size", 16, "--steps", steps,
                 "--log-every", 5, "--device", "cpu", "--resume", "auto"]
    assert train(*arguments, "--out", tmp_path / "whole").returncode == 0
    rng, at = random.Random(0), []
    for kill in range(6):
        cache = [] if kill else ["--cache", tmp_path / "other"]  # the first time, there are no decoded images
        where = "mixer.training.trainer.train_step" if kill else "mixer.data.packed.wait"
        plant = Plant(where, signal.SIGKILL, rng.randrange(6, 9), delay=rng.uniform(0, 0.01))  # each gets to one save more, some to two
        killed = train(*arguments, *cache, "--out", tmp_path / "cut", plants=[plant])
        assert killed.returncode == -signal.SIGKILL, killed
        last = tmp_path / "cut" / "last.pt"
        at.append(load_checkpoint(last, whole=True)["state"]["step"] if last.exists() else 0)
    assert train(*arguments, "--out", tmp_path / "cut").returncode == 0 and at == sorted(set(at)) and at[0] == 0 and at[-1] < steps, at
    same_run(tmp_path / "whole", tmp_path / "cut")
    hashes = {sha256_of_weights(tmp_path / name / "last.pt") for name in ("whole", "cut")}
    assert len(hashes) == 1
    record_property("note", f"real images, {size} px, {steps} steps, killed {len(at)} times, last saved at steps {at}: weights sha256 {hashes.pop()} in both runs")


def sha256_of_weights(path):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(path)["state_dict"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
