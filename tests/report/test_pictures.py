"""Pictures of a model show what it computes, which images they should, and cost no result."""
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mixer.data.batches import Subset
from mixer.models import create_model
from mixer.report import pictures
from mixer.report.figures import drawing
from mixer.report.pictures import class_attention, first_filters, write_pictures

CPU = torch.device("cpu")
CLASSES = ["cat $x^", "dog\n\x1b[2J", "Wheaten Terrier, soft-coated, " * 3]
VIT = dict(image_size=32, patch=8, dim=16, depth=3, heads=2)


def a_subset(n, size=32):
    """n of 2 n images, labelled 0, 1, 2, 0, ..."""
    images = torch.randint(0, 255, (2 * n, size, size, 3), dtype=torch.uint8)
    return Subset(images, torch.arange(2 * n) % 3, np.arange(n) * 2)


@pytest.mark.parametrize("name", ["vit_linear", "vit_cnn"])
def test_a_filter_is_what_a_patch_is_multiplied_with(name):
    model = create_model(name, **VIT)
    filters = first_filters(model)
    assert filters.shape == (16, 3, 8, 8)
    x = torch.rand(1, 3, 32, 32)
    want = (filters * x[0, :, 8:16, :8]).sum((1, 2, 3))  # second row, first column
    tokens = model.patch_embed(x)[0]
    torch.testing.assert_close(tokens[4] - model.patch_embed.proj.bias, want, rtol=1e-4, atol=1e-5)


def test_the_attention_is_that_of_the_forward_pass():
    """With values that are one-hot, attention's output is its weights."""
    torch.manual_seed(0)
    model = create_model("vit_cnn", **VIT).eval()
    x = torch.rand(2, 3, 32, 32)
    maps = class_attention(model, x)
    assert maps.shape == (2, 4, 4)
    inputs, attention = [], model.blocks[-1].attn
    hook = attention.register_forward_hook(lambda m, args, y: inputs.append(args[0]))
    model(x)
    hook.remove()
    q, k, _ = attention.qkv(inputs[0]).reshape(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    one_hot = torch.eye(17).expand(2, 2, 17, 17)
    weights = F.scaled_dot_product_attention(q, k, one_hot)[:, :, 0].mean(1)
    torch.testing.assert_close(maps, weights[:, 1:].view(2, 4, 4).detach())
    assert not attention.qkv._forward_hooks


def test_the_most_confident_mistakes_and_the_least_sure_right_answers_are_shown(monkeypatch):
    grids, subset = [], a_subset(60)
    monkeypatch.setattr(pictures, "draw_grid", lambda path, title, rows: grids.append(rows))
    probabilities = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    pictures.draw_mistakes(None, "", subset, list(map(str, range(60))), probabilities, CLASSES)
    shown = [int(caption.split("\n")[0]) for row in grids[0] for _, caption in row]
    order = probabilities.max(1)[0].argsort(descending=True).tolist()
    wrong = (probabilities.argmax(1) != subset.labels[subset.indices]).tolist()
    assert shown == [i for i in order if wrong[i]][:pictures.MOST_CONFIDENT] + [
        i for i in order[::-1] if not wrong[i]][:pictures.LEAST_SURE]


@pytest.mark.parametrize("name, options, n", [
    ("vit_linear", {"patch": 8, "dim": 16, "depth": 6, "heads": 2}, 9),
    ("vit_cnn", {"patch": 16, "dim": 100, "depth": 1, "heads": 2}, 1),
    ("convmixer", {"patch": 8, "dim": 4, "depth": 10, "kernel_size": 3}, 9),
    ("resnet18", {}, 1), ("efficientnetv2_b0", {}, 1)])
def test_every_model_is_drawn(tmp_path, capsys, name, options, n):
    model = create_model(name, image_size=32, num_classes=3, **options)
    files = ["Ünïcode $_{\\frac.jpg", *(f"\ud800{'long' * 30}{i}.jpg" for i in range(n - 1))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_pictures(tmp_path, model, name, a_subset(n), files, CPU,
                       torch.rand(n, 3).softmax(1), CLASSES)
    # a glyph that the font lacks, a layout that does not fit; what others deprecate is not ours
    assert not [w.message for w in caught if w.category is UserWarning]
    expected = {"attention.png"} if name.startswith("vit") else set()
    assert {path.name for path in tmp_path.iterdir()} == {
        "filters.png", "mistakes.png"} | expected, capsys.readouterr().err
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5, "something is drawn"


def test_without_labels_or_images_fewer_pictures_are_made(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise LookupError("no module\nof a notebook")
    monkeypatch.setattr(pictures, "draw_attention", drawing(fails))
    model = create_model("vit_cnn", **VIT)
    for n, files in ((2, ["a", "b"]), (0, [])):
        write_pictures(tmp_path, model, "vit", a_subset(n), files, CPU, None, CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["filters.png"]
    assert capsys.readouterr().err == "attention.png is not drawn: LookupError: no module\n"
