import numpy as np
import torch

from mixer.data.augment import augmentations
from mixer.data.batches import Subset, training_batch
from mixer.training.config import Config


def test_every_image_comes_once_an_epoch_whatever_the_batch():
    whole = training_batch(0, 10, Config(batch_size=60, seed=4))
    for epoch, (samples, augmentation) in enumerate(zip(*(np.split(part, 6) for part in whole),
                                                        strict=True)):
        assert sorted(samples) == list(range(10))
        assert (augmentation == augmentations(Config(seed=4), epoch, 10)[samples]).all()
    assert len(set(map(tuple, whole[0].reshape(6, 10).tolist()))) == 6
    for size in (1, 3, 4, 10):
        config = Config(batch_size=size, seed=4)
        batches = [training_batch(step, 10, config) for step in range(-(-60 // size))]
        for parts, expected in zip(zip(*batches, strict=True), whole, strict=True):
            assert (np.concatenate(parts)[:60] == expected).all(), "depends on the batch size"
    assert (training_batch(0, 10, Config(batch_size=60, seed=5))[0] != whole[0]).any()


def test_the_order_of_old_seeds_stays():
    assert training_batch(2, 7, Config(batch_size=5, seed=1))[0].tolist() == [0, 3, 2, 5, 0]


def test_a_subset_takes_its_own_images():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 2, 2, 3)
    subset = Subset(images, torch.arange(6), np.array([1, 3, 5]))
    x, y = subset.batch(np.array([2, 0]), torch.device("cpu"))
    assert y.tolist() == [5, 1] and x[:, 0, 0, 0].tolist() == [5, 1] and len(subset) == 3
