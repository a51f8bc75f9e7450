"""What a trained model has learned, as arrays to look at."""
import torch
from torch import nn
from torch.nn import functional as F


def patch_filters(model: nn.Module) -> torch.Tensor:
    """The filters of the first layer, (D, P, P, 3): of patches, or a convnet's."""
    embed = getattr(model, "patch_embed", None)
    if isinstance(getattr(embed, "proj", None), nn.Linear):
        return embed.proj.weight.detach().float().cpu().unflatten(1, (embed.patch, embed.patch, 3))
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return first.weight.detach().float().cpu().permute(0, 2, 3, 1)


def depthwise_kernels(model: nn.Module) -> list[torch.Tensor]:
    """The kernels of each depthwise conv, (D, K, K), from the image to the logits."""
    return [m.weight.detach().float().cpu()[:, 0] for m in model.modules()
            if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]


def position_similarities(model: nn.Module) -> torch.Tensor | None:
    """Of a ViT: the cosines between its positions, (h, w, h, w) without the class token.

    Dosovitskiy et al. 2021, figure 7 (center).
    """
    if not hasattr(model, "pos_embed"):
        return None
    positions = F.normalize(model.pos_embed.detach().float().cpu()[0, 1:], dim=1)  # (N, D)
    side = round(len(positions) ** 0.5)
    return (positions @ positions.T).view(side, side, side, side)


@torch.inference_mode()
def class_attention(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Of a ViT: how its class token attends to the patches of x (B, 3, S, S), in each block.

    (depth, B, h, w), the mean over the heads. A map sums to less than 1: the rest is the token's
    attention to itself.
    """
    if not hasattr(model, "pos_embed"):
        return None
    maps = []

    def record(attention, inputs, qkv):
        B, N, D = inputs[0].shape
        q, k, _ = qkv.float().reshape(B, N, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5      # (B, heads, 1, N)
        side = round((N - 1) ** 0.5)
        maps.append(scores.softmax(-1).mean(1)[:, 0, 1:].unflatten(1, (side, side)).cpu())
    hooks = [block.attn.qkv.register_forward_hook(
        lambda _, inputs, qkv, attention=block.attn: record(attention, inputs, qkv))
        for block in model.blocks]
    try:
        model.forward(x)  # not model(x): a compiled model would not call the hooks
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)
