"""The architectures by name: `create_model("vit_cnn", patch=16)`."""
import math
from typing import NamedTuple

from torch import nn

from .convmixer import ConvMixer
from .efficientnet import EfficientNetV2B0
from .mlp_mixer import MLPMixer
from .resnet import ResNet18
from .vit import ConvPatchEmbed, LinearPatchEmbed, ViT
from .weights import load_weights

__all__ = ["MODELS", "create_model", "load_weights", "model_options"]


class Architecture(NamedTuple):
    """A model class and the options that create_model takes for it.

    The class is called with image_size, num_classes, the options and `fixed`. Its `check` gets
    image_size and the options, and raises ValueError where they do not fit together.
    """

    model: type[nn.Module]
    defaults: dict[str, int | float | str | bool] = {}  # the original's values, if it had the model
    fixed: dict[str, object] = {}


_VIT = {"patch": 24, "dim": 512, "depth": 4, "heads": 8, "qkv_bias": False, "norm_eps": 1e-5}
_CONVMIXER = {"patch": 24, "dim": 512, "depth": 4, "kernel_size": 9, "act": "gelu"}
MODELS = {
    "resnet18": Architecture(ResNet18),
    "efficientnetv2_b0": Architecture(EfficientNetV2B0),
    "vit_linear": Architecture(ViT, _VIT, {"patch_embed": LinearPatchEmbed}),
    "vit_cnn": Architecture(ViT, _VIT, {"patch_embed": ConvPatchEmbed}),
    "convmixer": Architecture(ConvMixer, _CONVMIXER),
    "mlp_mixer": Architecture(MLPMixer, {"patch": 24, "dim": 512, "depth": 4}),
}
WORDS = {int: "a positive whole number", float: "a positive number", bool: "True or False",
         str: "a word"}


def model_options(name: str, image_size: int = 192, num_classes: int = 2,
                  **options: int | float | str | bool | None) -> dict:
    """All options of model `name`, with defaults for None. Raises ValueError for wrong ones."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    model, defaults, _ = MODELS[name]
    options = {**defaults, **{key: value for key, value in options.items() if value is not None}}
    problems = [f"{name} has no {key}" for key in options if key not in defaults]

    # each value by itself, then together
    numbers = {"image_size": image_size, "num_classes": num_classes}
    problems += [problem for key, value in {**numbers, **options}.items()
                 if (problem := _problem(key, value, defaults.get(key, 1)))]
    if problems:
        raise ValueError("; ".join(problems))
    model.check(image_size=image_size, **options)
    return options


def _problem(key, value, default):
    """What is wrong with a value that should be of the type of `default`, or None."""
    kind, words = type(default), WORDS[type(default)]
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if fits and (kind in (bool, str) or 0 < value < math.inf):
        return None
    return f"{key} must be {words}, not {value!r}"


def create_model(name: str, *, image_size: int = 192, num_classes: int = 2,
                 **options: int | float | str | bool | None) -> nn.Module:
    """A freshly initialised model, (B, 3, S, S) -> (B, num_classes) logits, S = image_size pixels.

    name is one of MODELS, which lists the options of each. An option that is left out or None has
    the original experiment's value: patch 24 pixels, dim 512 channels, depth 4; for a ViT heads 8,
    qkv_bias False, norm_eps 1e-5 (timm and torchvision: True, 1e-6); for a ConvMixer kernel_size 9,
    act "gelu" (the authors' 768/32: "relu"). Raises ValueError for an unknown name or wrong option.
    """
    options = model_options(name, image_size, num_classes, **options)
    model, _, fixed = MODELS[name]
    return model(image_size=image_size, num_classes=num_classes, **options, **fixed)
