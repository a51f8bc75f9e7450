"""What a checkpoint says of its model: describe it, load it, start another run from it."""
import contextlib
import functools
from pathlib import Path

import torch
from torch import nn

from ..data.augment import to_float
from ..data.images import decode
from ..models import MODELS, create_model, load_weights
from ..models.weights import match_weights
from ..runtime.checkpoint import load_checkpoint
from ..runtime.device import PACKAGES, environment
from ..runtime.distributed import World
from ..runtime.errors import InputError, listed, printable
from .config import MODEL_OPTIONS, Config
from .resume import FREE_ON_RESUME


def describe_model(config: Config, classes: list[str]) -> dict:
    """What a checkpoint holds beside the weights, as plain values: how to build and feed the model,
    and how it was trained."""
    size, versions = config.image_size, environment(torch.device("cpu"))
    options = {name: getattr(config, name) for name in MODELS[config.arch].defaults}
    recipe = {name: value for name, value in vars(config).items()
              if name not in {*FREE_ON_RESUME, *MODEL_OPTIONS, "arch"}}
    return {"name": config.arch, "options": {**options, "image_size": size},
            "classes": list(classes),
            "preprocessing": f"upright RGB, squeezed to {size}x{size}, x / 255",
            "versions": {name: versions[name] for name in ("python", *PACKAGES)}, "recipe": recipe}


def load_model(path: Path | str) -> nn.Module:
    """The model of a run's best.pt or last.pt, in eval mode, on the CPU.

    It has `classes` (names, in the order of its logits), `image_size` (pixels) and
    `preprocess(file)`: the path or the bytes of an image -> (1, 3, S, S), as in training. Raises
    ValueError if the file is damaged or does not describe its model.
    """
    return build_model(path, load_checkpoint(path, verify=True))


def build_model(path: Path | str, contents: dict) -> nn.Module:
    """The model of `load_model` from the contents of its checkpoint."""
    try:
        description = contents["description"]
        classes = list(map(str, description["classes"]))
        model = create_model(description["name"], num_classes=len(classes),
                             **description["options"])
        size = description["options"]["image_size"]
    except KeyError:
        raise ValueError(f"{printable(path)} does not describe its model; load its weights into "
                         f"one that you build: {_code_for(contents, path)}") from None
    except (TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{printable(path)} describes no model of ours: {printable(e)}") from e
    load_weights(model, contents)
    model.classes, model.image_size = classes, size
    model.preprocess = functools.partial(preprocess, image_size=size)
    return model.eval()


def preprocess(image: bytes | Path | str, image_size: int) -> torch.Tensor:
    """The bytes or the path of an image -> (1, 3, S, S) in [0, 1], upright and squeezed to S x S.

    Raises ValueError if the image does not decode.
    """
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return to_float(torch.tensor(decode(data, image_size))[None])


def _code_for(contents, path):
    """The line that loads a checkpoint without a description."""
    identity, arguments = contents.get("identity"), "NAME, ..."
    if isinstance(identity, dict) and identity.get("arch") in list(MODELS):
        name = identity["arch"]
        options = {key: identity[key] for key in ("image_size", *MODELS[name].defaults)
                   if key in identity}
        with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
            *_, bias = contents["state_dict"].values()  # of the head
            options["num_classes"] = len(bias)
        arguments = ", ".join([repr(name), *(f"{k}={v!r}" for k, v in options.items())])
    return printable(f"load_weights(create_model({arguments}), {str(path)!r}).eval()")


def start_from(config: Config, model: nn.Module, classes: list[str], world: World) -> str:
    """Load the weights that --init-from names into a new model, and say which it took.

    A head of another size or of other classes stays as it is. Only rank 0 reads the file. Raises
    InputError if it is damaged or its weights do not fit.
    """
    try:
        match = match_weights(model, config.init_from, classes) if world.rank == 0 else None
    except ValueError as e:
        raise InputError(f"--init-from: {e}") from None
    match = world.broadcast(match)
    model.load_state_dict(match.state, strict=False)
    lines = [f"{len(match.state)} of {len(model.state_dict())} tensors taken "
             f"({listed(match.state, 3)})",
             f"left fresh: {listed(match.fresh) or 'none'}", *match.notes]
    return f"--init-from {printable(config.init_from)}: " + "; ".join(lines)
