"""The five architectures by name: `create_model("vit_cnn", patch=16)`."""
from functools import partial

from .convmixer import ConvMixer
from .efficientnet import EfficientNetV2B0
from .resnet import ResNet18
from .vit import ConvPatchEmbed, LinearPatchEmbed, ViT
from .weights import load_weights

__all__ = ["MODELS", "create_model", "load_weights", "model_options"]

# name -> (class, {option it takes: the original experiment's value})
_VIT = {"patch": 24, "dim": 512, "depth": 4, "heads": 8}
MODELS = {
    "resnet18": (ResNet18, {}),
    "efficientnetv2_b0": (EfficientNetV2B0, {}),
    "vit_linear": (partial(ViT, patch_embed=LinearPatchEmbed), _VIT),
    "vit_cnn": (partial(ViT, patch_embed=ConvPatchEmbed), _VIT),
    "convmixer": (ConvMixer, {"patch": 24, "dim": 512, "depth": 4, "kernel_size": 9}),
}


def model_options(name, image_size=192, num_classes=2, **options):
    """The options `name` takes, defaults filled in, as a dict; an option that is None counts as not given.

    Raises ValueError naming everything that is wrong with them: one place, for every model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    defaults = MODELS[name][1]
    given = {key: value for key, value in options.items() if value is not None}
    resolved = {**defaults, **given}
    wrong = [f"{name} has no {key}" for key in given if key not in defaults]
    numbers = {"image_size": image_size, "num_classes": num_classes, **resolved}
    bad = {key: value for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int) or value < 1}
    wrong += [f"{key} must be a positive whole number, not {value!r}" for key, value in bad.items()]
    ok = {key: value for key, value in numbers.items() if key in (*defaults, "image_size") and key not in bad}
    if {"patch", "image_size"} <= ok.keys() and image_size % ok["patch"]:
        sides = ", ".join(str(side) for side in range(2, min(image_size, 1024) + 1) if image_size % side == 0)
        wrong.append(f"patch {ok['patch']} does not divide a {image_size}x{image_size} image (these do: {sides or 'only 1'})")
    if {"dim", "heads"} <= ok.keys() and ok["dim"] % ok["heads"]:
        wrong.append(f"dim {ok['dim']} does not divide into {ok['heads']} heads")
    if ok.get("kernel_size", 1) % 2 == 0:
        wrong.append(f"kernel_size {ok['kernel_size']} is even: 'same' padding needs a centre, take an odd one")
    if not defaults and ok.get("image_size", 32) < 32:
        wrong.append(f"{name} halves the image five times: image_size must be at least 32 pixels, not {image_size}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return resolved


def create_model(name, *, image_size=192, num_classes=2, patch=None, dim=None, depth=None, heads=None, kernel_size=None,
                 depthwise=None):
    """A freshly initialised model, (B, 3, S, S) -> (B, num_classes) logits, S = image_size in pixels.

    name is one of MODELS. Options left out take the original experiment's values: patch 24 and dim 512 pixels and
    channels, depth 4, heads 8 (ViT), kernel_size 9 (ConvMixer). depthwise(dim, kernel_size) builds another depthwise unit for ConvMixer,
    `kernels.DepthwiseGELUBN` for one. Raises ValueError for a name or a value that does
    not work, and for an option the model does not have.
    """
    options = model_options(name, image_size, num_classes,
                            patch=patch, dim=dim, depth=depth, heads=heads, kernel_size=kernel_size)
    if name.startswith("vit"):
        options["image_size"] = image_size
    if depthwise is not None:
        if name != "convmixer":
            raise ValueError(f"{name} has no depthwise unit to choose")
        options["depthwise"] = depthwise
    return MODELS[name][0](num_classes=num_classes, **options)
