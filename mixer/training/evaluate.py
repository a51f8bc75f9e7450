"""A model on the images of a subset: what it measures, and what it predicts."""
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.augment import to_float
from ..data.batches import Subset
from ..runtime.distributed import World


@torch.inference_mode()
def evaluate(model: nn.Module, subset: Subset, batch_size: int, device: torch.device, *,
             classes: int, world: World,
             amp: torch.dtype | None = None) -> tuple[float, float, list[list]]:
    """Mean loss, accuracy and confusion counts [true][predicted] over a Subset, each image once.

    Each rank of `world` takes a slice of each batch; that of the last batch may be empty. Leaves
    the model in eval mode.
    """
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for logits, y in logits_of(model, subset, batch_size, device, amp, world):
        loss += F.cross_entropy(logits, y, reduction="sum")
        confusion.index_add_(0, y * classes + logits.argmax(1), torch.ones_like(y))
    loss, confusion = world.sum(loss), world.sum(confusion).view(classes, classes).cpu()
    return loss.item() / len(subset), confusion.trace().item() / len(subset), confusion.tolist()


@torch.inference_mode()
def predict(model: nn.Module, subset: Subset, batch_size: int, device: torch.device,
            amp: torch.dtype | None = None) -> torch.Tensor:
    """float32 logits (M, classes), on the CPU, in the same batches as `evaluate` on one rank.

    Leaves the model in eval mode.
    """
    batches = logits_of(model, subset, batch_size, device, amp, World())
    return torch.cat([logits.cpu() for logits, _ in batches])


def logits_of(model: nn.Module, subset: Subset, batch_size: int, device: torch.device,
              amp: torch.dtype | None, world: World) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """float32 logits (B, classes) and labels (B,) of this rank's slice of each batch."""
    model.eval()
    for start in range(0, len(subset), batch_size):
        samples = world.batch_slice(np.arange(start, min(start + batch_size, len(subset))))
        if len(samples):
            images, y = subset.batch(samples, device)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(to_float(images))
            yield logits.float(), y
