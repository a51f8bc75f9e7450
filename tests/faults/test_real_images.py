"""On real Dogs vs. Cats images: set DOGS_VS_CATS to a zip or folder of them (Kaggle's train.zip,
PetImages, ...)."""
import os
import random
import signal

import numpy as np
import pytest

from mixer.data.cache import decode_to_cache, drop_damaged
from mixer.data.images import find_images
from mixer.models.weights import load_checkpoint
from tests.helpers.plants import TRAIN_STEP, Plant
from tests.helpers.runs import assert_same_run

PATH = os.environ.get("DOGS_VS_CATS")
pytestmark = pytest.mark.skipif(not PATH, reason="DOGS_VS_CATS names no images")


def test_real_images_are_found_decoded_and_balanced(tmp_path):
    images = find_images(PATH)
    assert [name.lower() for name in images.classes] == ["cat", "dog"]
    array, faults, _ = decode_to_cache(images, 192, tmp_path)
    good = drop_damaged(images, faults, "skip", tmp_path / "bad.csv")
    assert len(good) > 0.99 * len(images)
    picks = np.random.default_rng(0).choice(good, 20, replace=False)
    for index in picks:
        assert (array[index] == images.load(index, 192)).all()
    # photographs, not blanks
    assert 60 < array[picks].mean() < 180 and array[picks].std() > 30


@pytest.mark.parametrize("size, steps, dim", [
    (96, 60, 64), pytest.param(192, 150, 512, marks=pytest.mark.campaign)])
def test_killed_and_resumed_on_real_images(train, tmp_path, record_property, size, steps, dim):
    """Six times, at random moments, while decoding too; the weights are those of the uninterrupted
    run, to the last bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--arch", "convmixer", "--patch", 24, "--data", PATH, "--image-size", size,
                 "--batch-size", 16, "--steps", steps, "--log-every", 5, "--dim", dim,
                 "--device", "cpu", "--resume", "auto"]
    assert train(*arguments, "--out", whole).returncode == 0

    rng, saved = random.Random(0), []
    for kill in range(6):
        # first while decoding, into an empty cache; each later one gets to a save more, or two
        cache = [] if kill else ["--cache", tmp_path / "other"]
        where = TRAIN_STEP if kill else "os.pwrite"
        plant = Plant(where, signal.SIGKILL, rng.randrange(6, 9), delay=rng.uniform(0, 0.01))
        killed = train(*arguments, *cache, "--out", cut, plants=[plant])
        assert killed.returncode == -signal.SIGKILL, killed
        last = cut / "last.pt"
        saved.append(load_checkpoint(last)["state"]["step"] if last.exists() else 0)
    assert train(*arguments, "--out", cut).returncode == 0
    assert saved == sorted(set(saved)) and saved[0] == 0 and saved[-1] < steps, saved

    assert_same_run(whole, cut)
    record_property("note", f"real images, {size} px, {steps} steps, killed {len(saved)} times, "
                    f"last saved at steps {saved}: equal to the uninterrupted run")
