"""create_model: the rows, their sizes, gradients and errors."""
import pytest
import torch
from torch.nn import functional as F

from mixer.experiments import ROWS
from mixer.models import MODELS, create_model

PARAMETERS = {  # at 2 classes, the original's counted in its models
    "resnet18": 11_177_538, "efficientnetv2_b0": 5_861_266,
    "vit_linear-p24": 13_524_482, "vit_cnn-p24": 13_524_482,
    "vit_linear-p16": 13_073_922, "vit_cnn-p16": 13_073_922,
    "convmixer-p24": 2_114_050, "convmixer-p16": 1_622_530, "convmixer-p16-d8": 2_849_282,
    "mlp_mixer-p24": 9_426_690, "mlp_mixer-p16": 9_099_330,  # timm's
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_rows(row):
    model = create_model(row.arch, **row.options)
    assert count(model) == PARAMETERS[row.name]
    logits = model(torch.rand(2, 3, 192, 192))
    assert logits.shape == (2, 2)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.ne(0).any(), name


@pytest.mark.parametrize("name", MODELS)
def test_options_reach_the_model(name):
    small = {"patch": 8, "dim": 16, "depth": 2, "heads": 4, "kernel_size": 5}
    options = {key: value for key, value in small.items() if key in MODELS[name].defaults}
    model = create_model(name, image_size=32, num_classes=7, **options)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    if options:
        assert count(model) < 50_000 and len(model.blocks) == 2


@pytest.mark.parametrize("name, message", [
    ("convmixer", "patch 24 does not divide a 96x100 image"),
    ("vit_cnn", "positions for 192x192 images, not 96x100"),
    ("mlp_mixer", "patches of 192x192 images, not 96x100")])
def test_an_image_of_another_size_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, depth=1)(torch.rand(1, 3, 96, 100))


@pytest.mark.parametrize("name, options, message", [
    ("alexnet", {}, "unknown model 'alexnet'; choose from resnet18, efficientnetv2_b0, vit_linear"),
    ("vit_cnn", {"patch": 20}, "patch 20 does not divide a 192x192 image (these do: 2, 3, 4, 6, 8, "
                               "12, 16, 24, 32, 48, 64, 96, 192)"),
    ("convmixer", {"patch": 20}, "patch 20 does not divide"),
    *((name, {key: 9}, f"{name} has no {key}") for name, key in (
        ("resnet18", "patch"), ("vit_cnn", "patch_size"), ("vit_linear", "kernel_size"))),
    ("convmixer", {"kernel_size": 8}, "kernel_size 8 is even"),
    ("vit_cnn", {"dim": 500}, "dim 500 does not divide into 8 heads"),
    ("convmixer", {"depth": 0, "heads": 2}, "has no heads; depth must be a positive whole number"),
    ("vit_cnn", {"dim": 512.0}, "dim must be a positive whole number, not 512.0"),
    ("resnet18", {"num_classes": 0}, "num_classes must be"),
    ("convmixer", {"act": "silu"}, "act must be gelu or relu, not 'silu'"),
    ("convmixer", {"act": ["relu"]}, "act must be a word, not ['relu']"),
    ("vit_cnn", {"qkv_bias": 1}, "qkv_bias must be True or False, not 1"),
    ("vit_cnn", {"norm_eps": 0.0}, "norm_eps must be a positive number, not 0.0"),
    *((name, {"image_size": 16}, "at least 32 pixels, not 16")
      for name in ("resnet18", "efficientnetv2_b0"))])
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError) as e:
        create_model(name, **options)
    assert message in str(e.value)
