"""Training: optimizer, learning rate, step, and the loop that also validates, saves and logs.

Read `Trainer.loop`. What it calls in a step, and where that is:

    learning_rate     here
    training_batch    data/batches.py: which samples, and the random numbers of each
    batch_slice       runtime/distributed.py: this rank's part of them
    Subset.batch      data/batches.py: their pixels and labels
    augment           data/augment.py: flipped and rotated
    train_step        here: forward, loss, backward, Adam

Every --log-every steps it calls `end_interval`: validate, save, log.
"""
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..data.augment import augment
from ..data.batches import Subset, training_batch
from ..models.flops import TRAINING_PASSES, forward_flops
from ..report.runs import log_line
from ..runtime.device import peak_memory_mib
from ..runtime.distributed import World
from ..runtime.errors import Diverged, Interrupted
from ..runtime.files import write_csv
from ..runtime.processes import Stop
from .checkpoint import save_checkpoint
from .config import Config
from .evaluate import evaluate

SMALLEST_SCALE = 1e-4  # the fp16 loss scale starts at 65536, and each overflow halves it


@dataclass
class State:
    """What last.pt holds of a run, besides the model, optimizer and scaler."""

    step: int                 # steps taken
    log: list[dict]           # the entries of log.csv
    best: dict | None         # the first entry with the highest validation accuracy
    confusion: list | None    # counts [true][predicted] of the last validation
    loss: torch.Tensor        # summed over this rank's images since the last entry, on the device
    correct: torch.Tensor     # number of these that were classified correctly

    def logged_step(self) -> int:
        """The step of the last entry."""
        return self.log[-1]["step"] if self.log else 0


# The recipe

def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam; decoupled weight decay on weights with two or more axes: not on biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)  # fused: no wait for the GradScaler


def skipped_steps(optimizer: torch.optim.Optimizer, steps: int) -> int:
    """How many of `steps` the GradScaler skipped: those that the optimizer did not count itself.

    0 if the optimizer keeps no count.
    """
    state = next(iter(optimizer.state.values()), {"step": 0})
    return steps - int(state.get("step", steps))


def learning_rate(step: int, config: Config) -> float:
    """For step `step` (from 0): linear warm-up, then constant, or half a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    angle = math.pi * (step - config.warmup) / (config.steps - config.warmup)
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

    # on a CPU, keep the memory of the gradients: smaller tensors would take parts of it, and the
    # next gradients would need new memory
    optimizer.zero_grad(set_to_none=x.device.type != "cpu")
    return loss.detach(), (logits.argmax(1) == y).sum()


# The loop

class Trainer:
    """Train `model` on one Subset, validate on another, write log.csv, last.pt, best.pt to `out`.

    amp: the autocast dtype. description, identity: of the model and of the run, for its checkpoints
    (see checkpoint.py).
    Each rank of `world` takes a slice of each batch. All have the same state but for the two sums,
    and only rank 0 writes.
    """

    def __init__(self, model: nn.Module, train_set: Subset, val_set: Subset, config: Config,
                 out: Path, *, device: torch.device, amp: torch.dtype | None, description: dict,
                 identity: dict, world: World):
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.config, self.out, self.device, self.amp = config, out, device, amp
        self.description, self.identity, self.world = description, identity, world

        # what a checkpoint holds
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.state = State(step=0, log=[], best=None, confusion=None,
                           loss=torch.zeros((), dtype=torch.float64, device=device),
                           correct=torch.zeros((), dtype=torch.int64, device=device))

        # DDP averages the ranks' gradients: the weight makes that the mean over images
        slice_size = len(world.batch_slice(range(config.batch_size)))
        self.loss_weight = slice_size * world.size / config.batch_size
        self.step_flops = (TRAINING_PASSES * forward_flops(model, config.image_size)
                           * config.batch_size)

    def resume(self, checkpoint: dict) -> None:
        """Continue from a checkpoint of `save_last`."""
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty: it trained without fp16, as on a CPU
            self.scaler.load_state_dict(checkpoint["scaler"])
        # a single process may stop between two entries, so its sums are restored; several ranks
        # stop only at an entry, where the sums are 0
        sums = {name: checkpoint["state"][name].to(self.device) * (self.world.rank == 0)
                for name in ("loss", "correct")}
        self.state = State(**{**checkpoint["state"], **sums})

    def fit(self) -> State:
        """Train until `steps`. Raises Diverged, and Interrupted when a signal came."""
        # after `resume`: compiling and DistributedDataParallel start from the loaded weights
        if self.config.compile:
            self.model.compile()
        self.network = DistributedDataParallel(self.model) if self.world.size > 1 else self.model
        self.start_clock()
        self.bar = tqdm(total=self.config.steps, initial=self.state.step, unit="step",
                        dynamic_ncols=True,
                        disable=True if self.world.rank else None)  # None: without a terminal
        with self.bar, Stop() as stop:
            self.loop(stop)
        return self.state

    def loop(self, stop: Stop) -> None:
        config, state = self.config, self.state
        while True:
            # every --log-every steps: validate, save, log
            interval_ended = self.interval_ended()
            if interval_ended:
                self.end_interval()

            # a signal or the last step ends the run
            if self.stop_requested(stop, interval_ended):
                self.save_and_stop(stop.signum or signal.SIGTERM)
            if state.step >= config.steps:
                return

            # this rank's slice of the next batch, augmented
            start = time.perf_counter()
            batch = training_batch(state.step, len(self.train_set), config)
            samples, augmentation = map(self.world.batch_slice, batch)  # (B,) each
            images, y = self.train_set.batch(samples, self.device)      # uint8 (B, S, S, 3), (B,)
            x = augment(images, augmentation)                           # float (B, 3, S, S)
            self.waited += time.perf_counter() - start

            # one step; nothing waits for the device
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
            loss, correct = train_step(
                self.network, x, y, self.optimizer, self.scaler, amp=self.amp,
                weight=self.loss_weight, label_smoothing=config.label_smoothing,
                clip_grad=config.clip_grad)
            state.step += 1
            state.loss += loss.double() * len(y)
            state.correct += correct
            self.bar.update()

    def interval_ended(self) -> bool:
        """Whether a log entry is due. Right after a resume it is not: there is nothing to time."""
        step = self.state.step
        due = step % self.config.log_every == 0 or step >= self.config.steps
        return due and step > self.first_step

    def stop_requested(self, stop: Stop, interval_ended: bool) -> bool:
        """Whether any rank got a signal. Several ranks agree on it at the end of an interval."""
        if self.world.size > 1 and not interval_ended:
            return False
        return bool(self.world.sum(torch.tensor(stop.signum)))

    def start_clock(self) -> None:
        """Time the steps from now on."""
        self.begin, self.first_step, self.waited = self.now(), self.state.step, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def end_interval(self) -> None:
        """Validate, save, log. Raises Diverged before anything is saved."""
        entry, state = self.measure(), self.state
        self.check_finite(entry["train_loss"], entry["val_loss"])
        state.log.append(entry)
        state.loss.zero_()
        state.correct.zero_()
        # best.pt, then last.pt and the log
        if len(self.val_set) and (state.best is None or entry["val_acc"] > state.best["val_acc"]):
            state.best = entry
            self.save("best.pt", {"entry": entry})
        self.save_last()
        self.bar.write(log_line(entry), file=sys.stdout)
        sys.stdout.flush()
        self.start_clock()

    def measure(self) -> dict:
        """The entry of log.csv for the steps since the last one."""
        step, config = self.state.step, self.config
        seconds = self.now() - self.begin  # before the validation, which is not timed
        train_loss, train_acc = self.training_means()
        val_loss = val_acc = None
        if len(self.val_set):
            self.world.broadcast_buffers(self.model)
            val_loss, val_acc, self.state.confusion = evaluate(
                self.model, self.val_set, config.batch_size, self.device,
                classes=len(self.description["classes"]), amp=self.amp, world=self.world)

        # images that are kept on the GPU are not counted
        images = self.train_set.images
        memory = peak_memory_mib(self.device) - images.is_cuda * images.nbytes / 2**20
        return {"step": step, "train_loss": train_loss, "train_acc": train_acc,
                "val_loss": val_loss, "val_acc": val_acc,
                "lr": learning_rate(step - 1, config),
                "images_per_s": (step - self.first_step) * config.batch_size / seconds,
                "data_wait": self.waited / seconds, "memory_mib": memory,
                "skipped": skipped_steps(self.optimizer, step), "flops": self.step_flops * step}

    def training_means(self) -> tuple[float, float]:
        """Loss and accuracy since the last entry: means over the images of all ranks."""
        images = (self.state.step - self.state.logged_step()) * self.config.batch_size
        sums = torch.stack([self.state.loss, self.state.correct.double()])
        return tuple((self.world.sum(sums) / images).tolist())

    def check_finite(self, train_loss: float, val_loss: float | None = None) -> None:
        """Raise Diverged, in all ranks, if a loss, a weight or a moment is not finite, or if the
        fp16 loss scale has collapsed."""
        tensors = list(self.model.state_dict().values())
        tensors += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors
                              if tensor.is_floating_point() and tensor.device == self.device])
        scale = self.scaler.get_scale()
        if math.isfinite(train_loss + (val_loss or 0)) and finite.all() and scale >= SMALLEST_SCALE:
            return
        # say between which steps, what to try, and where to go on from
        last = self.out / "last.pt"
        good = f"; the last good checkpoint is {last}" if last.exists() else ""
        raise Diverged(
            f"diverged between steps {self.state.logged_step()} and {self.state.step}, with "
            f"training loss {train_loss}, validation loss {val_loss}, fp16 loss scale {scale:.1g}: "
            f"try a smaller --lr, a --warmup or --clip-grad 1{good}")

    def save_and_stop(self, signum: int) -> None:
        """Save the steps since the last entry, and raise Interrupted."""
        if self.state.step > self.state.logged_step():
            self.check_finite(self.training_means()[0])
            self.save_last()
        raise Interrupted(signum, f" at step {self.state.step}; "
                                  f"continue with --out={self.out} --resume auto")

    def save_last(self) -> None:
        """Write last.pt, then log.csv: a copy of the log in last.pt."""
        self.save("last.pt", {
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "state": vars(self.state)})
        if self.world.rank == 0:
            write_csv(self.out / "log.csv", self.state.log)

    def save(self, name: str, contents: dict) -> None:
        """Write a checkpoint: the weights, their description, and `contents`."""
        if self.world.rank == 0:
            save_checkpoint(self.out / name, {
                "state_dict": self.model.state_dict(), "description": self.description,
                "identity": self.identity, **contents})
