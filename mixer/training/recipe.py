"""The recipe: optimizer, learning rate, a plain AMP step, evaluation."""
import math

import numpy as np
import torch
from torch.nn import functional as F

from ..data.augment import to_float
from ..runtime.distributed import World


def make_optimizer(model, lr, weight_decay=0.0):
    """Adam with the default betas; weight decay is decoupled and spares what has one axis: biases and norms."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)  # fused: with a GradScaler, no wait for the device


def learning_rate(step, config, steps):
    """Of step `step`, counted from 0: linear warm-up, then constant, or half a cosine down to 0 at `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, steps - config.warmup)))


def train_step(model, x, y, optimizer, scaler, *, amp=None, label_smoothing=0.0, clip_grad=None, weight=1.0):
    """One optimizer step on float x (B, 3, H, W) and int64 y (B,); amp is the autocast dtype or None.

    weight: of this loss, where several processes average their gradients over unequal parts of a batch.
    Returns the mean loss and the number of correct answers, both on the device: nothing here waits for it.
    """
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
    scaler.scale(loss if weight == 1 else loss * weight).backward()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), (logits.argmax(1) == y).sum()


def applied_steps(optimizer):
    """How many steps the optimizer has made; a GradScaler skips those whose gradients overflowed."""
    for state in optimizer.state.values():
        return int(state["step"].item())
    return 0


@torch.inference_mode()
def evaluate(model, part, batch_size, device, *, classes, amp=None, stop=lambda: False, world=World()):
    """Over a Subset, each image once: mean loss, accuracy, confusion counts [true][predicted] as nested lists.

    Leaves the model in eval mode. Returns None as soon as `stop()` is true. The processes of `world` take equal shares of each
    batch, the last ones perhaps none, and ask `stop` equally often.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for start in range(0, len(part), batch_size):
        if stop():
            return None
        samples = world.batch_slice(np.arange(start, min(start + batch_size, len(part))))
        if len(samples) == 0:
            continue
        images, y = part.batch(samples, device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(to_float(images)).float()
        loss += F.cross_entropy(logits, y, reduction="sum")
        confusion.index_add_(0, y * classes + logits.argmax(1), torch.ones_like(y))
    loss, confusion = world.sum(loss), world.sum(confusion).view(classes, classes).cpu()
    return loss.item() / len(part), confusion.trace().item() / len(part), confusion.tolist()
