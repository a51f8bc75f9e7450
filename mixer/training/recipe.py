"""The experiment: optimizer, learning rate, training step and evaluation."""
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.augment import to_float
from ..data.batches import Subset
from ..runtime.distributed import World
from .config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam; decoupled weight decay on weights with two or more axes: not on biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)  # fused: no wait for the GradScaler


def skipped_steps(optimizer: torch.optim.Optimizer, steps: int) -> int:
    """How many of `steps` a GradScaler skipped, by Adam's own count; 0 if an optimizer has none."""
    state = next(iter(optimizer.state.values()), {"step": 0})
    return steps - int(state.get("step", steps))


def learning_rate(step: int, config: Config) -> float:
    """For step `step` (from 0): linear warm-up, then constant, or half a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    angle = math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(angle))


def train_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *,
               amp: torch.dtype | None = None, label_smoothing: float = 0.0, weight: float = 1.0,
               clip_grad: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on float x (B, 3, H, W) and int64 y (B,); amp is the autocast dtype.

    weight multiplies the loss, for ranks that average the gradients of unequal slices of a batch.
    Returns the mean loss and the number of correct predictions, on the device, without waiting.
    """
    # forward; the loss in fp32
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)

    # backward; in fp16 the scaler keeps small gradients from 0, and skips steps that overflow
    scaler.scale(loss if weight == 1 else loss * weight).backward()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()

    # keep gradients on a CPU: smaller tensors would split the blocks of memory that they free
    optimizer.zero_grad(set_to_none=x.device.type != "cpu")
    return loss.detach(), (logits.argmax(1) == y).sum()


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
