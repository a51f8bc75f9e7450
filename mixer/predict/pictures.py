"""The pictures of a model: its mistakes, its filters, its attention."""
from pathlib import Path

import torch
from torch import nn

from ..data.augment import to_float
from ..data.batches import Subset
from ..models.inspection import (
    class_attention,
    depthwise_kernels,
    patch_filters,
    position_similarities,
)
from ..report.pictures import Answer, draw_attention, draw_filters, draw_mistakes, evenly_spaced

MOST_CONFIDENT, LEAST_SURE, ATTENTION = 16, 8, 6  # images in a picture


def write_pictures(out: Path, model: nn.Module, title: str, subset: Subset, files: list[str],
                   device: torch.device, probabilities: torch.Tensor | None = None,
                   classes: list[str] | None = None) -> list[str]:
    """Write filters.png, attention.png of a ViT, and mistakes.png if the probabilities (M, classes)
    of labelled images are given, into the folder `out`. Returns their names.

    files: the name of each image of `subset`, M of them.
    """
    similarities = position_similarities(model)
    draw_filters(out / "filters.png", title, patch_filters(model).numpy(),
                 [layer.numpy() for layer in depthwise_kernels(model)],
                 None if similarities is None else similarities.numpy())
    written = ["filters.png"]
    if probabilities is not None and len(subset):
        draw_mistakes(out / "mistakes.png", title,
                      answers_to_show(probabilities, subset, files, classes))
        written.append("mistakes.png")
    if similarities is not None and len(subset):
        some = evenly_spaced(len(subset), ATTENTION)
        images, _ = subset.batch(some, device)
        draw_attention(out / "attention.png",
                       f"{title}: attention of the class token, mean over the heads",
                       images.cpu().numpy(), [files[i] for i in some],
                       class_attention(model.eval(), to_float(images)).numpy())
        written.append("attention.png")
    return written


def answers_to_show(probabilities: torch.Tensor, subset: Subset, files: list[str],
                    classes: list[str]) -> dict[str, list[Answer]]:
    """The mistakes of the highest probability, and the answers of the lowest, each under its
    heading."""
    highest, answers = probabilities.max(1)
    labels = subset.labels.cpu()[subset.indices]
    wrong = answers != labels

    def answer(i):
        pixels = subset.images[subset.indices[i]].cpu().numpy()
        return Answer(pixels, files[i], classes[labels[i]], classes[answers[i]], highest[i].item())
    order = highest.argsort(descending=True, stable=True).tolist()
    mistakes = [i for i in order if wrong[i]]
    return {f"most confident of {len(mistakes):,} mistakes in {len(order):,} images":
            [answer(i) for i in mistakes[:MOST_CONFIDENT]],
            "least sure": [answer(i) for i in order[::-1][:LEAST_SURE]]}
