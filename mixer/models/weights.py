"""Other people's weights into our models."""
from ..runtime.checkpoint import load_checkpoint

PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def load_weights(model, source):
    """Load a state dict, or the file that holds one, into `model`, strictly; returns the model.

    Understands what timm and torchvision save, the plain nn.Sequential of ConvMixer's authors, weights kept under
    `state_dict` or `model`, the prefixes of DataParallel, torch.compile and Lightning, and either patch embedding
    of a ViT for the other. Raises ValueError naming the keys and shapes that do not fit.
    """
    state = source if isinstance(source, dict) else load_checkpoint(source)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {_strip(name): tensor for name, tensor in state.items()}
    if "0.weight" in state:
        state = _from_authors_convmixer(state)
    own = model.state_dict()
    name = "patch_embed.proj.weight"
    if name in own and name in state and own[name].ndim != state[name].ndim:
        state[name] = _other_patch_embed(state[name], own[name])

    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfit = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    wrong = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
             for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misfit)) if keys]
    if wrong:
        raise ValueError(f"these weights do not fit {type(model).__name__}: {'; '.join(wrong)}")
    model.load_state_dict(state)
    return model


def _strip(name):
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _from_authors_convmixer(state):
    """Sequential(conv, GELU, BN, *blocks, pool, flatten, linear) numbering -> stem, blocks, head."""
    last = max(int(name.split(".")[0]) for name in state)

    def rename(name):
        index, rest = name.split(".", 1)
        if int(index) < 3:
            return f"stem.{name}"
        return f"head.{rest}" if int(index) == last else f"blocks.{int(index) - 3}.{rest}"
    return {rename(name): tensor for name, tensor in state.items()}


def _other_patch_embed(weight, like):
    """The weight of one patch embedding as the other holds it: (D, C, P, P) <-> (D, P * P * C)."""
    if weight.ndim == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    D, C, P, _ = like.shape
    return weight.reshape(D, P, P, C).permute(0, 3, 1, 2)
