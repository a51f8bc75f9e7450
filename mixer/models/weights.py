"""Load weights that other programs saved into our models."""
import re
from pathlib import Path

from torch import nn

from ..runtime.checkpoint import load_checkpoint
from ..runtime.errors import listed

PREFIXES = r"^((module|_orig_mod|model)\.)+"  # of DataParallel, torch.compile and Lightning


def load_weights(model: nn.Module, source: dict | Path | str) -> nn.Module:
    """Load a state dict, or a file with one, into `model`, strictly. Returns the model.

    Accepts the files of timm and torchvision, the plain nn.Sequential of ConvMixer's authors,
    a state dict under the key `state_dict` or `model`, PREFIXES, and the weights of one patch
    embedding of a ViT for the other. Raises ValueError with the keys and shapes that do not fit.
    """
    state = source if isinstance(source, dict) else load_checkpoint(source)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]

    # our names and shapes
    state = {re.sub(PREFIXES, "", name): tensor for name, tensor in state.items()}
    if "0.weight" in state:
        state = _from_authors_convmixer(state)
    own = model.state_dict()
    name = "patch_embed.proj.weight"
    if name in own and name in state and own[name].ndim != state[name].ndim:
        if state[name].ndim == 4:  # (D, C, P, P) -> (D, P * P * C)
            state[name] = state[name].permute(0, 2, 3, 1).flatten(1)
        elif state[name].numel() == own[name].numel():
            D, C, P, _ = own[name].shape
            state[name] = state[name].reshape(D, P, P, C).permute(0, 3, 1, 2)

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


def _from_authors_convmixer(state):
    """Names of Sequential(conv, GELU, BN, *blocks, pool, flatten, linear) -> stem, blocks, head."""
    last = max(int(name.split(".")[0]) for name in state)

    def rename(name):
        index, rest = name.split(".", 1)
        if int(index) < 3:
            return f"stem.{name}"
        return f"head.{rest}" if int(index) == last else f"blocks.{int(index) - 3}.{rest}"
    return {rename(name): tensor for name, tensor in state.items()}
