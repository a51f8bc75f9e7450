"""Pictures of a trained model: its mistakes, its filters, and what its class token attends to."""
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..data.augment import to_float
from ..data.batches import Subset
from ..runtime.errors import printable
from .figures import drawing, new_figure, save

COLUMNS = 8                                       # tiles side by side
MOST_CONFIDENT, LEAST_SURE, ATTENTION = 16, 8, 6  # images in a picture
FILTERS = 64                                      # at most, per layer
NAME_LENGTH = 24                                  # characters of a file name


def write_pictures(out: Path, model: nn.Module, title: str, subset: Subset, files: Sequence[str],
                   device: torch.device, probabilities: torch.Tensor | None,
                   classes: list[str]) -> None:
    """Write filters.png, mistakes.png if the probabilities (M, classes) of labelled images are
    given, and attention.png of a ViT, into the folder `out`.

    files: the name of each image of `subset`, M of them.
    """
    draw_filters(out / "filters.png", title, model)
    if probabilities is not None:
        draw_mistakes(out / "mistakes.png", title, subset, files, probabilities, classes)
    if hasattr(model, "pos_embed") and len(subset):
        draw_attention(out / "attention.png", title, model, subset, files, device)


def draw_grid(path: Path, title: str, rows: list[list[tuple]], side: float = 1.75) -> None:
    """Rows of (image, caption) in a grid; an image is `side` inches wide."""
    columns = max(map(len, rows))
    figure, panels = new_figure(side * columns, (side + 0.5) * len(rows) + 0.5, columns, len(rows),
                                title)
    for panel in panels:
        panel.axis("off")
    for i, row in enumerate(rows):
        for panel, (image, caption) in zip(panels[i * columns:], row, strict=False):
            panel.imshow(image.cpu().numpy())
            panel.set_title(caption, fontsize=7.5, parse_math=False)
    save(figure, path)


@drawing
def draw_mistakes(path: Path, title: str, subset: Subset, files: Sequence[str],
                  probabilities: torch.Tensor, classes: list[str]) -> None:
    """The mistakes of the highest probability, then the right predictions of the lowest."""
    # most confident mistakes, least confident right ones
    highest, predicted = probabilities.max(1)
    truths = subset.labels.cpu()[subset.indices]
    order = highest.argsort(descending=True, stable=True)
    wrong = (predicted != truths)[order]
    mistakes, unsure = order[wrong][:MOST_CONFIDENT], order[~wrong].flip(0)[:LEAST_SURE]

    # with what the model said and what is true
    def captioned(i):
        file, name, truth = map(shortened, (files[i], classes[predicted[i]], classes[truths[i]]))
        image = subset.images[subset.indices[i]]
        return image, f"{file}\n{name} {highest[i]:.3f}\ntruth: {truth}"
    rows = [[captioned(i) for i in group[start:start + COLUMNS]]
            for group in (mistakes, unsure) for start in range(0, len(group), COLUMNS)]
    draw_grid(path, f"{title}: the {len(mistakes)} most confident of {wrong.sum():,} mistakes in "
              f"{len(files):,} images, then the {len(unsure)} least sure right ones", rows)


def shortened(name: str) -> str:
    """The end of the base name of a file, or of a class."""
    return printable(name.rpartition("/")[2])[-NAME_LENGTH:]


@drawing
def draw_filters(path: Path, title: str, model: nn.Module) -> None:
    """The first filters of the first layer, and beside them of the first depthwise conv, if any."""
    layers, row = {"the first layer": first_filters(model)}, []
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1:
            layers.setdefault("the first depthwise conv", m.weight.expand(-1, 3, -1, -1))
    for layer, filters in layers.items():
        tiles = filters[:FILTERS].detach().float()
        n, _, h, w = tiles.shape
        tiles = 0.5 + 0.5 * tiles / tiles.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        tiles = F.pad(tiles, (0, 1, 0, 1, 0, 0, 0, -n % COLUMNS), value=1)  # white lines between
        tiles = tiles.unflatten(0, (-1, COLUMNS)).permute(0, 3, 1, 4, 2)  # (rows, h, COLUMNS, w, 3)
        row.append((tiles.flatten(2, 3).flatten(0, 1),
                    f"{n} of {len(filters)} filters of {layer}, {h}x{w} pixels:\neach from minus "
                    "to plus its largest value, grey is 0"))
    draw_grid(path, title, [row], side=6.4)


def first_filters(model: nn.Module) -> torch.Tensor:
    """The filters of the first layer, (D, 3, P, P): of a conv, or of a matrix on patches."""
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    if isinstance(first, nn.Conv2d):
        return first.weight
    P = math.isqrt(first.in_features // 3)
    return first.weight.unflatten(1, (P, P, 3)).permute(0, 3, 1, 2)


@drawing
def draw_attention(path: Path, title: str, model: nn.Module, subset: Subset, files: Sequence[str],
                   device: torch.device) -> None:
    """Some images, and below each the same one lit by the attention of the class token: the patch
    that it attends to most is the brightest."""
    some = torch.linspace(0, len(subset) - 1, min(ATTENTION, len(subset))).long().numpy()
    images, _ = subset.batch(some, device)
    light = class_attention(model.eval(), to_float(images))
    light = F.interpolate(light[None], images.shape[1:3])[0, ..., None]   # (B, S, S, 1)
    light = 0.1 + 0.9 * light / light.amax((1, 2), keepdim=True)
    images = images.cpu() / 255
    names = [shortened(files[i]) for i in some]
    rows = [list(zip(images, names, strict=True)), [(image, "") for image in images * light]]
    draw_grid(path, f"{title}: attention of the class token, last block, mean of the heads", rows)


@torch.inference_mode()
def class_attention(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """How the class token of a ViT attends to the patches of x (B, 3, S, S), in the last block.

    (B, h, w) on the CPU, the mean over the heads. A map sums to less than 1: the rest is the
    token's attention to itself.
    """
    attention, seen = model.blocks[-1].attn, []
    hook = attention.qkv.register_forward_hook(lambda layer, inputs, qkv: seen.append(qkv.float()))
    try:
        model.forward(x)  # not model(x): a compiled model would not call the hook
    finally:
        hook.remove()
    B, N, _ = seen[0].shape
    q, k, _ = seen[0].reshape(B, N, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    scores = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5      # (B, heads, 1, N)
    side = math.isqrt(N - 1)
    return scores.softmax(-1).mean(1)[:, 0, 1:].unflatten(1, (side, side)).cpu()
