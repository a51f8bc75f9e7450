"""On real Dogs vs. Cats images: set DOGS_VS_CATS to a zip or folder of them (Kaggle's train.zip,
PetImages, ...)."""
import os

import numpy as np
import pytest

from mixer.data.cache import decode_to_cache
from mixer.data.images import find_images
from mixer.data.split import drop_damaged
from tests.helpers.pictures import load

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
        assert (array[index] == load(images, index, 192)).all()
    # photographs, not blanks
    assert 60 < array[picks].mean() < 180 and array[picks].std() > 30
