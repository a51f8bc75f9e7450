"""Load weights that other programs saved into our models."""
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..runtime.checkpoint import load_checkpoint
from ..runtime.errors import listed
from .convmixer import ConvMixer
from .vit import ViT

# wrappers that put their name into each parameter's: DataParallel, torch.compile, FSDP, DeepSpeed
WRAPPERS = (r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
            r"\.")
# torchvision's ViT -> ours
TORCHVISION = {
    r"^class_token$": "cls_token", r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.", r"^encoder\.ln\.": "norm.", r"^heads\.head\.": "head.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\.ln_([12])\.": r".norm\1.", r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.", r"\.mlp\.(3|linear_2)\.": ".mlp.fc2."}


class Match(NamedTuple):
    """What of a checkpoint goes into a model."""

    state: dict[str, torch.Tensor]  # by the model's names, in its shapes
    fresh: list[str]                # the model's names that the checkpoint does not give
    notes: list[str]                # what a person should know


def load_weights(model: nn.Module, source: Mapping | Path | str) -> nn.Module:
    """Load a state dict, or a checkpoint with one, into `model`, strictly. Returns the model.

    source: a file, or its contents. Accepts the weights of timm and torchvision, the plain
    nn.Sequential of ConvMixer's authors, and those of one patch embedding of a ViT for the other,
    each under any key and behind any prefix. Positions are resampled to the model's image size.
    Warns if the checkpoint also holds averaged weights. Raises ValueError with the names and shapes
    that do not fit, and if the checkpoint says that it had another activation or number of heads.
    Names cannot tell the activation of other people's ConvMixers: create_model(..., act="relu").
    """
    match = match_weights(model, source)
    for note in match.notes:
        warnings.warn(note, stacklevel=2)
    model.load_state_dict(match.state, strict=False)
    return model


def match_weights(model: nn.Module, source: Mapping | Path | str,
                  classes: list[str] | None = None) -> Match:
    """The weights in `source` by the names of `model`, which stays as it is.

    classes: those of the model; a head of another size or of other classes, or none, is then left
    fresh. Raises as load_weights.
    """
    if isinstance(source, (str, os.PathLike)):
        source = load_checkpoint(source)
    if not isinstance(source, Mapping):
        raise ValueError("weights are a state dict or the path of a checkpoint, not a "
                         f"{type(source).__name__}; of a model, give its state_dict()")
    own = model.state_dict()
    state, notes = _find_state(model, source)

    # values that fit after a change of shape
    name = "patch_embed.proj.weight"
    if name in own and name in state and own[name].ndim != state[name].ndim:
        if state[name].ndim == 4:  # (D, C, P, P) -> (D, P * P * C)
            state[name] = state[name].permute(0, 2, 3, 1).flatten(1)
        elif state[name].numel() == own[name].numel():
            D, C, P, _ = own[name].shape
            state[name] = state[name].reshape(D, P, P, C).permute(0, 3, 1, 2)
    if isinstance(model, ViT) and "pos_embed" in state:
        side, old = (_grid_side(tensors["pos_embed"]) for tensors in (own, state))
        if side and old and side != old:
            state["pos_embed"] = resample_positions(state["pos_embed"], side)
            notes.append(f"positions resampled from {old}x{old} to {side}x{side} patches")

    # what is left fresh: the head, if it may be, and counters that old torchvision files lack
    head = [] if classes is None else _head(model)
    if (_stated(source).get("classes", classes) == classes
            and all(name in state and state[name].shape == own[name].shape for name in head)):
        head = []
    state = {name: tensor for name, tensor in state.items() if name not in head}
    fresh = [name for name in own if name in head
             or (name not in state and name.endswith("num_batches_tracked"))]

    # refuse what does not fit
    problems = {
        "missing": [name for name in own if name not in state and name not in fresh],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own if name in state and own[name].shape != state[name].shape],
        "not of plain floating-point numbers": [
            name for name in own if name in state and own[name].is_floating_point()
            and (not state[name].is_floating_point() or state[name].layout != torch.strided
                 or state[name].is_meta)],
    }
    problems = [f"{len(names)} {problem} ({listed(sorted(names), 3)})"
                for problem, names in problems.items() if names]
    if problems:
        raise ValueError(f"these weights do not fit {type(model).__name__}: {'; '.join(problems)}"
                         + _hint(model, state))
    notes += _check_options(model, source)
    return Match(state, fresh, notes)


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


def _grid_side(pos_embed):
    """The side in patches of the image that (1, 1 + n * n, D) positions belong to, or None."""
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    return math.isqrt(patches) if patches > 0 and math.isqrt(patches) ** 2 == patches else None


def _head(model):
    """The names of the last linear layer's parameters."""
    layer = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return [f"{layer}.weight", f"{layer}.bias"]


# finding the state dict

def _find_state(model, source):
    """({name: tensor}, notes): the state dict in a checkpoint that shares most names with `model`.

    Averaged weights (`state_dict_ema`) come second.
    """
    own = model.state_dict().keys()
    found = [(path, _our_names(model, tensors), beside)
             for path, tensors, beside in _state_dicts(source)]
    if not found:
        raise ValueError(f"there are no weights in it, only {listed(source, 5) or 'nothing'}")

    def rank(item):
        path, state, _ = item
        averaged = "ema" in ".".join(path).lower()
        return len(own & state.keys()), not averaged, len(state)
    path, state, beside = best = max(found, key=rank)
    others = [".".join(other[0]) or "no key" for other in found
              if other is not best and rank(other)[0] == rank(best)[0] > 0]
    place, notes = ".".join(path) or "no key", []
    if others:
        notes.append(f"the weights are those under {place}; others are under {listed(others)}")
    elif beside:
        notes.append(f"the weights are those under {place}; {beside} tensors beside it stay unread")
    return state, notes


def _state_dicts(source: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """What may be a state dict in a checkpoint: (keys and prefixes that lead there,
    {name: tensor}, number of tensors beside it)."""
    tensors = {}
    for name, value in source.items():
        if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray)
                                               and value.dtype.kind in "biuf"):
            short = re.sub(WRAPPERS, "", str(name))
            if short in tensors:
                raise ValueError(f"{name} and another tensor are both called {short}")
            tensors[short] = _tensor(value)
    tensors.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    if tensors:
        yield from _behind_prefixes(tensors, path, len(tensors))
    for key, value in source.items():
        if isinstance(value, Mapping) and len(path) < 3:
            yield from _state_dicts(value, (*path, str(key)))


def _behind_prefixes(tensors, path, total, depth=3):
    """The tensors, and those of each `model.`, `net.`, `backbone.` by itself."""
    yield path, tensors, total - len(tensors)
    groups = {}
    for name, tensor in tensors.items():
        word, dot, rest = name.partition(".")
        if dot and depth:
            groups.setdefault(word, {})[rest] = tensor
    for word, group in groups.items():
        yield from _behind_prefixes(group, (*path, word), total, depth - 1)


def _tensor(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.tensor(np.array(value, dtype=value.dtype.newbyteorder("=")))


def _our_names(model, state):
    """The state dict by our names, if its names are torchvision's or the authors'."""
    if isinstance(model, ConvMixer) and "0.weight" in state:
        return _from_authors_convmixer(state)
    if isinstance(model, ViT) and "conv_proj.weight" in state:
        return {_substituted(name, TORCHVISION): tensor for name, tensor in state.items()}
    return state


def _substituted(name, patterns):
    for pattern, ours in patterns.items():
        name = re.sub(pattern, ours, name)
    return name


def _from_authors_convmixer(state):
    """Names of Sequential(conv, GELU, BN, *blocks, pool, flatten, linear) -> stem, blocks, head."""
    numbered = [name for name in state if re.match(r"\d+\.", name)]
    last = max(int(name.split(".")[0]) for name in numbered)

    def rename(name):
        index, rest = name.split(".", 1)
        if int(index) < 3:
            return f"stem.{name}"
        return f"head.{rest}" if int(index) == last else f"blocks.{int(index) - 3}.{rest}"
    return {rename(name) if name in numbered else name: tensor for name, tensor in state.items()}


# what names and shapes do not tell

def silent_options(model: nn.Module) -> dict[str, str | int | float]:
    """The options of a model that change what it computes, and no name or shape of its weights."""
    if isinstance(model, ConvMixer):
        return {"act": type(model.stem[1]).__name__.lower()}
    if isinstance(model, ViT):
        return {"heads": model.blocks[0].attn.heads, "norm_eps": model.norm.eps}
    return {}


def _check_options(model, source):
    """Compare silent_options with those that a checkpoint of ours states. Returns notes."""
    stated, ours = _stated(source).get("options", {}), silent_options(model)
    problems = [f"{name} {stated[name]!r}, and this model has {value!r}"
                for name, value in ours.items()
                if isinstance(stated.get(name), (str, int, float)) and stated[name] != value]
    if problems:
        raise ValueError(f"these weights were trained with {'; '.join(problems)}")
    if isinstance(model, ViT) and not stated and model.blocks[0].attn.qkv.bias is not None:
        if ours["norm_eps"] != 1e-6:
            return [f"this model has norm_eps {ours['norm_eps']:g}; the ViTs of timm and "
                    "torchvision have 1e-06"]
    return []


def _stated(source):
    """What a checkpoint of ours says of its model, or {}."""
    description, identity = source.get("description"), source.get("identity")
    if isinstance(description, dict) and isinstance(description.get("options"), dict):
        return description
    # of a run before there were descriptions
    return {"options": identity} if isinstance(identity, dict) else {}


def _hint(model, state):
    if isinstance(model, ViT) and "blocks.0.attn.qkv.bias" in state.keys() - model.state_dict():
        return ("; a ViT of timm or torchvision needs qkv_bias=True and norm_eps=1e-6 "
                "(--qkv-bias --norm-eps 1e-6)")
    return ""
