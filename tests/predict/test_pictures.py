"""The pictures of a model: which images they show, and that odd names and sizes are drawn."""
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mixer.data.batches import Subset
from mixer.models import create_model
from mixer.predict.pictures import LEAST_SURE, MOST_CONFIDENT, answers_to_show, write_pictures

CLASSES = ["cat $x^", "dog\n\x1b[2J", "Wheaten Terrier, soft-coated, " * 3]


def a_subset(n, size=32):
    """n of 2 n images, whose first pixel is their index, labelled 0, 1, 2, 0, ..."""
    images = torch.randint(0, 255, (2 * n, size, size, 3), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(2 * n)
    return Subset(images, torch.arange(2 * n) % 3, np.arange(n) * 2)


def test_the_most_confident_mistakes_and_the_least_sure_answers_are_shown():
    subset, generator = a_subset(60), torch.Generator().manual_seed(0)
    probabilities = torch.rand(60, 3, generator=generator).softmax(1)
    files = [f"folder/{index}.jpg" for index in subset.indices]
    groups = answers_to_show(probabilities, subset, files, CLASSES)
    (heading, mistakes), (_, unsure) = groups.items()
    highest, answers = probabilities.max(1)
    truths = torch.from_numpy(subset.indices) % 3
    wrong = (answers != truths).nonzero().flatten().tolist()
    assert heading == f"most confident of {len(wrong)} mistakes in 60 images"
    want = sorted(wrong, key=lambda i: -highest[i])[:MOST_CONFIDENT]
    assert [a.file for a in mistakes] == [files[i] for i in want]
    for i, a in zip(want, mistakes, strict=True):
        assert a.pixels[0, 0, 0] == subset.indices[i], "the image itself"
        assert (a.truth, a.answer) == (CLASSES[truths[i]], CLASSES[answers[i]])
        assert a.probability == highest[i].item()
    assert [a.probability for a in unsure] == sorted(highest.tolist())[:LEAST_SURE]


@pytest.mark.parametrize("name,options,expected", [
    ("vit_linear", {"patch": 8, "dim": 16, "depth": 6, "heads": 2}, {"attention.png"}),
    ("vit_cnn", {"patch": 16, "dim": 100, "depth": 1, "heads": 2}, {"attention.png"}),
    ("convmixer", {"patch": 8, "dim": 4, "depth": 10, "kernel_size": 3}, set()),
    ("resnet18", {}, set()),
    ("efficientnetv2_b0", {}, set())])
@pytest.mark.parametrize("n", [1, 9])
def test_every_model_is_drawn(tmp_path, name, options, expected, n):
    model = create_model(name, image_size=32, num_classes=3, **options)
    subset = a_subset(n)
    files = ["Ünïcode $_{\\frac.jpg", *(f"\ud800{'long' * 30}{i}.jpg" for i in range(n - 1))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = write_pictures(tmp_path, model, name, subset, files, torch.device("cpu"),
                                 torch.rand(n, 3).softmax(1), CLASSES)
    # a glyph that the font lacks, a layout that does not fit; what others deprecate is not ours
    assert not [w.message for w in caught if w.category is UserWarning]
    assert set(written) == {"filters.png", "mistakes.png"} | expected
    assert {path.name for path in tmp_path.iterdir()} == set(written)
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5, "something is drawn"


def test_without_labels_or_images_fewer_pictures_are_made(tmp_path):
    model = create_model("vit_cnn", image_size=32, patch=8, dim=16, depth=1, heads=2)
    cpu = torch.device("cpu")
    assert write_pictures(tmp_path, model, "vit", a_subset(2), ["a", "b"], cpu) == [
        "filters.png", "attention.png"]
    assert write_pictures(tmp_path, model, "vit", a_subset(0), [], cpu) == ["filters.png"]
