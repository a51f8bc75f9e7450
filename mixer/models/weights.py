"""Read checkpoints without executing anything; load their weights, and those of other programs."""
import argparse
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..runtime.errors import InputError, first_line, listed, printable

# first bytes of files that are mistaken for checkpoints
OTHER_FILES = {b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file",
               b"\x89hdf": "an HDF5 file; only PyTorch's and safetensors' files are read",
               b"<html": "a web page", b"<!doctype": "a web page"}
# torchvision's ViT -> ours
TORCHVISION = {
    r"^class_token$": "cls_token", r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.", r"^encoder\.ln\.": "norm.", r"^heads\.head\.": "head.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\.ln_([12])\.": r".norm\1.", r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.", r"\.mlp\.(3|linear_2)\.": ".mlp.fc2."}


def load_checkpoint(path: Path | str) -> dict:
    """The dict in a file of torch.save or safetensors, on the CPU, checked by its checksums.

    Nothing in the file is executed: it may hold tensors, plain values and argparse.Namespace.
    Raises ValueError, naming the file and the reason, if it is missing, damaged or no checkpoint.
    """
    try:
        # not another kind of file; opening a named pipe would wait for ever
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")
        with open(path, "rb") as file:
            start = file.read(40).lstrip().lower()
        for first, kind in OTHER_FILES.items():
            if start.startswith(first):
                raise ValueError(f"it is {kind}")

        # each byte of a zip, as torch.save writes; torch.load does not compare the checksums
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if any(name.endswith("/constants.pkl") for name in file.namelist()):
                    raise ValueError("it is a TorchScript file; save the state dict of its model")
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")

        # the contents
        if Path(path).suffix == ".safetensors":  # what timm downloads
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # hostile bytes raise nearly every exception type
        reason = first_line(e.__context__ or e)  # the context lacks torch's advice to unpickle
        raise InputError(f"{printable(path)} is not a readable checkpoint: "
                         f"{printable(reason)}") from e
    if not isinstance(contents, dict):
        raise InputError(f"{printable(path)} holds a {type(contents).__name__}, not a dict of "
                         "weights")
    return contents


def load_weights(model: nn.Module, source: Mapping | Path | str) -> nn.Module:
    """Load a state dict, or a checkpoint with one, into `model`, strictly. Returns the model.

    source: a file, or its contents. Accepts the weights of timm and torchvision and the plain
    nn.Sequential of ConvMixer's authors, also under `state_dict`, `model` or `model_state_dict`,
    and with the prefixes `module.`, `_orig_mod.` or `model.`. Positions are resampled to the image
    size. Raises ValueError with the names and shapes that do not fit, and if the checkpoint says
    that it had another activation, eps or number of heads.
    """
    model.load_state_dict(match_weights(model, source)[0], strict=False)
    return model


def match_weights(model: nn.Module, source: Mapping | Path | str,
                  classes: list[str] | None = None) -> tuple[dict, list[str]]:
    """{name: tensor}, the weights in `source` in the names and shapes of `model`; and the names of
    those that keep their initial values. `model` does not change.

    classes: those of the model. A head of another size or of other classes, or none, then keeps its
    initial values. Raises as load_weights.
    """
    if not isinstance(source, Mapping):
        source = load_checkpoint(source)
    own, state = model.state_dict(), _our_names(_state_dict(source))
    stated = source.get("description")  # what a checkpoint of ours says of its model
    stated = stated if isinstance(stated, dict) else {}

    # values that fit after a change of shape
    name = "patch_embed.proj.weight"
    if name in own and name in state and (own[name].ndim, state[name].ndim) == (2, 4):
        state[name] = state[name].permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) -> (D, P * P * C)
    name = "pos_embed"
    if name in own and name in state and state[name].ndim == 3:
        n, side = (math.isqrt(s[name].shape[1] - 1) for s in (state, own))
        if n != side and n * n == state[name].shape[1] - 1:
            state[name] = resample_positions(state[name], side)

    # skip a head of another size or of other classes, where that is allowed
    head = list(own)[-2:]  # every model defines it last: weight and bias
    if classes is None or (stated.get("classes", classes) == classes and all(
            name in state and state[name].shape == own[name].shape for name in head)):
        head = []
    state = {name: tensor for name, tensor in state.items() if name not in head}

    # names and shapes that do not fit; old files of torchvision lack counters
    both = own.keys() & state.keys()
    missing = {name for name in own.keys() - state.keys() - set(head)
               if not name.endswith("num_batches_tracked")}
    problems = [f"{problem} {listed(sorted(names), 3)}" for problem, names in (
        ("missing", missing), ("unexpected", state.keys() - own.keys()),
        ("of another shape", [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
                              for name in both if state[name].shape != own[name].shape]),
        ("not of floating-point numbers", [
            name for name in both
            if own[name].is_floating_point() and not state[name].is_floating_point()])) if names]
    # options that would compute something else
    silent, options = getattr(model, "options_not_in_weights", {}), stated.get("options", {})
    problems += [f"they were trained with {name} {options[name]!r}, and this model has {value!r}"
                 for name, value in silent.items() if options.get(name, value) != value]
    if problems:
        raise InputError(f"these weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    if not options and "blocks.0.attn.qkv.bias" in own and silent["norm_eps"] != 1e-6:
        warnings.warn(f"this model has norm_eps {silent['norm_eps']:g}; the ViTs of timm and "
                      "torchvision have 1e-06", stacklevel=3)
    return state, head


def _state_dict(source):
    """{name: tensor}: the weights in a checkpoint, without the prefixes of wrappers."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(source.get(key), Mapping):
            source = source[key]
    tensors = {str(name): value.detach() for name, value in source.items()
               if isinstance(value, torch.Tensor) and name != "n_averaged"}  # AveragedModel's
    state = {re.sub(r"\b(module|_orig_mod|model)\.", "", name): tensor
             for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise InputError("these are the weights of several models: without the prefixes module. "
                         f"and model. some names are equal ({listed(tensors, 3)})")
    return state


def _our_names(state):
    """The state dict by our names, if its names are torchvision's or the authors'."""
    patterns = TORCHVISION if "conv_proj.weight" in state else {}
    if "0.weight" in state:  # Sequential(conv, GELU, BN, *blocks, pool, flatten, linear)
        last = max(int(name.split(".")[0]) for name in state if re.match(r"\d+\.", name))
        patterns = {rf"^{last}\.": "head.", r"^([0-2])\.": r"stem.\1.",
                    r"^(\d+)\.": lambda index: f"blocks.{int(index[1]) - 3}."}
    for pattern, ours in patterns.items():
        state = {re.sub(pattern, ours, name): tensor for name, tensor in state.items()}
    return state


def resample_positions(pos_embed: torch.Tensor, side: int) -> torch.Tensor:
    """(1, 1 + n * n, D) -> (1, 1 + side * side, D): bicubic, antialiased, the first token kept.

    The result equals timm's `resample_abs_pos_embed`.
    """
    first, grid = pos_embed[:, :1], pos_embed[:, 1:]
    n = math.isqrt(grid.shape[1])
    image = grid.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)               # (1, D, n, n)
    image = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
    grid = image.permute(0, 2, 3, 1).flatten(1, 2).to(grid.dtype)               # (1, side^2, D)
    return torch.cat([first, grid], dim=1)
