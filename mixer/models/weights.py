"""Load weights that other programs saved into our models."""
from pathlib import Path

import torch
from torch import nn

from ..runtime.checkpoint import load_checkpoint
from ..runtime.errors import listed

PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def load_weights(model: nn.Module, source: dict | Path | str) -> nn.Module:
    """Load a state dict, or a file with one, into `model`, strictly. Returns the model.

    Accepts the files of timm and torchvision, the plain nn.Sequential of ConvMixer's authors,
    a state dict under the key `state_dict` or `model`, the prefixes of DataParallel, torch.compile
    and Lightning, and the weights of one patch embedding of a ViT for the other.
    Raises ValueError that names the keys and shapes that do not fit.
    """
    # find the state dict
    state = source if isinstance(source, dict) else load_checkpoint(source)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]

    # give its tensors our names and shapes
    state = {_without_prefixes(name): tensor for name, tensor in state.items()}
    if "0.weight" in state:
        state = _from_authors_convmixer(state)
    own = model.state_dict()
    name = "patch_embed.proj.weight"
    if name in own and name in state and own[name].ndim != state[name].ndim:
        state[name] = _to_other_patch_embed(state[name], own[name].shape)

    # refuse what does not fit
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own if name in state and own[name].shape != state[name].shape],
    }
    problems = [f"{len(names)} {problem} ({listed(sorted(names), 3)})"
                for problem, names in problems.items() if names]
    if problems:
        raise ValueError(f"these weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)
    return model


def _without_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _from_authors_convmixer(state: dict) -> dict:
    """Names of Sequential(conv, GELU, BN, *blocks, pool, flatten, linear) -> stem, blocks, head."""
    last = max(int(name.split(".")[0]) for name in state)

    def rename(name):
        index, rest = name.split(".", 1)
        if int(index) < 3:
            return f"stem.{name}"
        return f"head.{rest}" if int(index) == last else f"blocks.{int(index) - 3}.{rest}"
    return {rename(name): tensor for name, tensor in state.items()}


def _to_other_patch_embed(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The weight of one patch embedding in the shape of the other: (D, C, P, P) <-> (D, P*P*C)."""
    if weight.ndim == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    D, C, P, _ = shape
    return weight.reshape(D, P, P, C).permute(0, 3, 1, 2)
