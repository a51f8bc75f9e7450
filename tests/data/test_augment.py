import math

import numpy as np
import torch

from mixer.data import augment as module
from mixer.data.augment import augment, augmentations, to_float
from mixer.training.config import Config


def images(count, side=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def augmentation(flips, angles):
    drawn = np.zeros(len(flips), module.AUGMENTATION)
    drawn["flip"], drawn["angle"] = flips, angles
    return drawn


def rotated(image, angle):
    """(H, W, 3) -> (3, H, W) in [0, 1]: pixel by pixel in float64, with a reflect-101 border."""
    H, W, _ = image.shape
    image = image.numpy().astype(np.float64) / 255

    def reflect(i, n):
        return (n - 1) - abs((i % (2 * n - 2)) - (n - 1))
    out = np.empty((3, H, W))
    cy, cx = (H - 1) / 2, (W - 1) / 2
    for i in range(H):
        for j in range(W):
            x = math.cos(angle) * (j - cx) - math.sin(angle) * (i - cy) + cx
            y = math.sin(angle) * (j - cx) + math.cos(angle) * (i - cy) + cy
            x0, y0 = math.floor(x), math.floor(y)
            out[:, i, j] = sum(
                (1 - abs(x - u)) * (1 - abs(y - v)) * image[reflect(v, H), reflect(u, W)]
                for u in (x0, x0 + 1) for v in (y0, y0 + 1))
    return torch.from_numpy(out)


def test_rotation_equals_its_definition():
    batch = images(3)
    angle = [0.2, 0.0, -math.radians(module.MAX_ANGLE)]
    out = augment(batch, augmentation([False] * 3, angle))
    for got, image, a in zip(out, batch, angle, strict=True):
        # coordinates in fp32: an error of some 1e-6 pixels, times a contrast of at most 1 per pixel
        assert (got.double() - rotated(image, a)).abs().max() < 1e-5
    # and the measure can fail: the other direction is far away
    assert (out[0].double() - rotated(batch[0], -0.2)).abs().max() > 0.1


def test_flip_mirrors_left_and_right():
    batch = images(4)
    out = augment(batch, augmentation([True, False, True, False], [0] * 4))
    expected = to_float(batch)
    expected[[0, 2]] = expected[[0, 2]].flip(3)
    assert torch.equal(out, expected)


def test_output_is_contiguous_float_in_0_1_and_the_input_is_untouched():
    batch = images(8)
    before = batch.clone()
    out = augment(batch, augmentations(Config(seed=0), 0, 8))
    assert out.dtype == torch.float32 and out.shape == (8, 3, 24, 24) and out.is_contiguous()
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(batch, before)


def test_a_sample_is_augmented_alike_in_any_batch():
    count = 2 * module.CPU_GROUP + 5
    batch, drawn = images(count), augmentations(Config(seed=3), 1, count)
    whole = augment(batch, drawn)
    for i in range(count):
        assert torch.equal(augment(batch[i:i + 1], drawn[i:i + 1])[0], whole[i])


def test_they_are_keyed_by_seed_epoch_and_sample():
    drawn = augmentations(Config(seed=5), 2, 1000)
    assert (augmentations(Config(seed=5), 2, 10) == drawn[:10]).all()
    for seed, epoch in ((5, 3), (6, 2)):
        assert (augmentations(Config(seed=seed), epoch, 1000) != drawn).any()


def test_flips_and_angles_of_old_seeds_stay():
    """Another transform draws under a key of its own."""
    drawn = augmentations(Config(seed=1), 2, 5)
    assert drawn["flip"].tolist() == [False, True, False, False, True]
    assert np.degrees(drawn["angle"]).round(3).tolist() == [6.931, -14.332, 0.0, 0.0, 5.771]


def test_they_follow_the_originals_distribution():
    drawn = augmentations(Config(seed=0), 0, 100_000)
    flip, angle = drawn["flip"], drawn["angle"]
    turned = angle[angle != 0]
    # the standard deviation of the fraction of heads in 100,000 coins is 0.0016; six of them
    assert abs(flip.mean() - 0.5) < 0.01 and abs(len(turned) / 100_000 - 0.5) < 0.01
    assert np.abs(turned).max() <= math.radians(15)
    assert abs(turned.std() - math.radians(15) / 3 ** 0.5) < 0.01
    assert abs(np.corrcoef(flip, angle)[0, 1]) < 0.02
