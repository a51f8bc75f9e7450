"""The five architectures by name: `create_model("vit_cnn", patch=16)`."""
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .convmixer import ConvMixer
from .efficientnet import EfficientNetV2B0
from .resnet import ResNet18
from .vit import ConvPatchEmbed, LinearPatchEmbed, ViT
from .weights import load_weights

__all__ = ["ACTIVATIONS", "MODELS", "create_model", "load_weights", "model_options"]

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}  # of ConvMixer


class Architecture(NamedTuple):
    """A model class, and the options of create_model that it has, with the original's values."""

    model: type[nn.Module]
    defaults: dict[str, int | float | str | bool] = {}
    patch_embed: type[nn.Module] | None = None  # of a ViT


_VIT = {"patch": 24, "dim": 512, "depth": 4, "heads": 8, "qkv_bias": False, "norm_eps": 1e-5}
_CONVMIXER = {"patch": 24, "dim": 512, "depth": 4, "kernel_size": 9, "act": "gelu"}
MODELS = {
    "resnet18": Architecture(ResNet18),
    "efficientnetv2_b0": Architecture(EfficientNetV2B0),
    "vit_linear": Architecture(ViT, _VIT, LinearPatchEmbed),
    "vit_cnn": Architecture(ViT, _VIT, ConvPatchEmbed),
    "convmixer": Architecture(ConvMixer, _CONVMIXER),
}


def model_options(name: str, image_size: int = 192, num_classes: int = 2,
                  **options: int | float | str | bool | None) -> dict:
    """All options of model `name`, with defaults for None. Raises ValueError with all problems."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    model, defaults, _ = MODELS[name]
    options = {**defaults, **{key: value for key, value in options.items() if value is not None}}
    values = {"image_size": image_size, "num_classes": num_classes, **options}
    wrong = {key: problem for key, value in values.items()
             if (problem := _problem(key, value))}
    problems = [f"{name} has no {key}" for key in options if key not in defaults]
    problems += wrong.values()
    sizes = ["image_size", *(key for key, value in defaults.items() if type(value) is int)]
    problems += model.check(**{key: None if key in wrong else values[key] for key in sizes})
    if problems:
        raise ValueError("; ".join(problems))
    return options


def _problem(key, value):
    """What is wrong with the value of an option, in words, or None."""
    if key == "act":
        fits, words = value in list(ACTIVATIONS), " or ".join(ACTIVATIONS)
    elif key == "qkv_bias":
        fits, words = type(value) is bool, "True or False"
    elif key == "norm_eps":
        fits, words = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
    else:
        fits, words = type(value) is int and value > 0, "a positive whole number"
    return None if fits else f"{key} must be {words}, not {value!r}"


def create_model(name: str, *, image_size: int = 192, num_classes: int = 2,
                 patch: int | None = None, dim: int | None = None, depth: int | None = None,
                 heads: int | None = None, kernel_size: int | None = None, act: str | None = None,
                 qkv_bias: bool | None = None, norm_eps: float | None = None,
                 depthwise: Callable[[int, int], nn.Module] | None = None) -> nn.Module:
    """A freshly initialised model, (B, 3, S, S) -> (B, num_classes) logits, S = image_size pixels.

    name is one of MODELS. An option that is None has the original experiment's value: patch 24
    pixels, dim 512 channels, depth 4; for a ViT heads 8, qkv_bias False, norm_eps 1e-5 (timm and
    torchvision: True, 1e-6); for a ConvMixer kernel_size 9, act "gelu" (the authors' 768/32:
    "relu"). depthwise(dim, kernel_size) builds another depthwise unit for ConvMixer, for example
    `kernels.DepthwiseGELUBN`. Raises ValueError for an unknown name and for wrong options.
    """
    options = model_options(name, image_size, num_classes, patch=patch, dim=dim, depth=depth,
                            heads=heads, kernel_size=kernel_size, act=act, qkv_bias=qkv_bias,
                            norm_eps=norm_eps)
    model, _, patch_embed = MODELS[name]
    if model is ViT:
        options.update(image_size=image_size, patch_embed=patch_embed)
    if model is ConvMixer:
        options["act"] = ACTIVATIONS[options["act"]]
    if depthwise is not None:
        if model is not ConvMixer:
            raise ValueError(f"{name} has no depthwise unit to choose")
        if act not in (None, "gelu"):
            raise ValueError(f"act {act} and depthwise: give a unit with this activation to "
                             "ConvMixer(act=..., depthwise=...)")
        options["depthwise"] = depthwise
    return model(num_classes=num_classes, **options)
