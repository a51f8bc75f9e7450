"""The trained model of the front page: it loads, and answers as the run's checkpoint did."""
import os

import pytest
import torch

from mixer import load_model
from mixer.data.augment import to_float
from mixer.data.demo import render
from mixer.data.images import find_images
from mixer.models.weights import load_checkpoint
from tests.helpers.runs import read_json, read_rows
from tests.helpers.tables import RESULTS

FOLDER = RESULTS / "cats-and-dogs"


def test_it_is_small_and_loads():
    path = FOLDER / "best.pt"
    assert path.stat().st_size <= 4e6
    weights = load_checkpoint(path)["state_dict"].values()
    assert {t.dtype for t in weights} == {torch.float16, torch.int64}
    model = load_model(path)
    assert model.classes == ["cat", "dog"] and model.image_size == 192
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_answers_as_in_float32():
    """On synthetic images, whose probabilities were kept before the weights were rounded to 11
    bits: each of some ten layers adds 1e-3 of its result at most, and a probability changes by a
    quarter of its logit."""
    kept = torch.tensor([float(row["p_dog"]) for row in read_rows(FOLDER / "float32.csv")])
    x = to_float(torch.stack([torch.from_numpy(render(i, 192)) for i in range(len(kept))]))
    with torch.inference_mode():
        ours = load_model(FOLDER / "best.pt")(x).softmax(1)[:, 1]
    torch.testing.assert_close(ours, kept, rtol=0, atol=0.01)
    assert kept.std() > 0.01, "the pictures differ"
    run = RESULTS / "study-c-lr1e-3" / "convmixer-p16"  # whose best.pt it was
    summary, evaluation = map(read_json, (run / "summary.json", FOLDER / "evaluation.json"))
    # of 2,500 images, 20 have a probability within 0.01 of a half
    assert abs(summary["best_val_acc"] - evaluation["accuracy"]) <= 20 / 2500


@pytest.mark.skipif("DOGS_VS_CATS" not in os.environ, reason="needs DOGS_VS_CATS, real images")
def test_it_tells_cats_from_dogs():
    """Nine tenths of these images are those it was trained on."""
    images, model = find_images(os.environ["DOGS_VS_CATS"]), load_model(FOLDER / "best.pt")
    some = range(0, len(images), len(images) // 50)
    with torch.inference_mode():
        answers = [model(model.preprocess(images.read(i))).argmax().item() for i in some]
    right = sum(answer == images.labels[i] for answer, i in zip(answers, some, strict=True))
    assert right > 0.8 * len(some)
