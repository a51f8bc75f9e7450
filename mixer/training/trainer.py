"""The loop around the recipe: step, log, save."""
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..data.augment import augment, draws_for
from ..data.batches import Stream, Subset
from ..experiments import row_name
from ..models.flops import TRAINING_PASSES, forward_flops
from ..report.figures import LiveCurves
from ..report.runs import describe
from ..runtime import signals
from ..runtime.checkpoint import save_checkpoint
from ..runtime.device import explain_out_of_memory, peak_memory_mib, pick_amp, sum_dtype
from ..runtime.distributed import World
from ..runtime.errors import Diverged, InputError, Interrupted, shell_word
from ..runtime.files import write_csv
from .config import Config
from .recipe import evaluate, learning_rate, make_optimizer, train_step
from .saved import describe_model

SMALLEST_SCALE = 1e-4  # of the fp16 loss; it starts at 65536, and each overflow halves it


@dataclass
class State:
    """What last.pt holds of a run, beside model, optimizer, scaler and running sums."""

    step: int                 # steps taken
    rows: list[dict]          # of log.csv
    best: dict | None         # the first row with the highest validation accuracy
    confusion: list | None    # of the last validation
    seconds: float            # of training


class Trainer:
    """Train `model` on one Subset, validate on another, write log.csv, last.pt, best.pt to `out`.

    identity: of the run, saved with its checkpoints (see resume.py). Each rank of `world` takes a
    slice of each batch. All have the same state but for the running sums, and only rank 0 writes.
    """

    def __init__(self, model: nn.Module, train_set: Subset, val_set: Subset, config: Config,
                 out: Path, *, device: torch.device, classes: list[str], identity: dict,
                 world: World):
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.config, self.out, self.identity = config, out, identity
        self.device, self.classes, self.world = device, classes, world
        self.description = describe_model(config, classes)
        self.amp = pick_amp(config.amp, device)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.stream = Stream(len(train_set), config.batch_size, config.seed)
        self.steps = config.steps if config.epochs is None else self.stream.steps(config.epochs)
        self.state = State(step=0, rows=[], best=None, confusion=None, seconds=0.0)
        self.running = Running(device)
        self.clock = Clock(device)
        slice_size = len(world.batch_slice(range(config.batch_size)))
        self.loss_weight = slice_size * world.size / config.batch_size
        self.step_flops = (TRAINING_PASSES * forward_flops(model, config.image_size)
                           * config.batch_size)
        name = row_name(config.arch, config.patch, config.depth)
        self.curves = LiveCurves(out / "curves.png", name)
        self.images_mib = train_set.images.nbytes / 2**20 if train_set.images.is_cuda else 0.0

    def resume(self, checkpoint: dict) -> None:
        """Go on from a checkpoint of `save`. Raises InputError if it does not fit."""
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            state = dict(checkpoint["state"])
            loss, correct = state.pop("loss"), state.pop("correct")
            self.state = State(**state)
            if self.world.rank == 0:  # the sums of all ranks
                self.running.loss.copy_(loss)
                self.running.correct.copy_(correct)
                steps = self.state.step - self.last_row_step()
                self.running.images = steps * self.config.batch_size
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            raise InputError(f"--resume: the checkpoint does not fit this run: {reason}") from e

    def fit(self) -> State:
        """Train until `steps`. Raises Diverged, and Interrupted when a signal came."""
        if self.state.rows and self.world.rank == 0:
            write_csv(self.out / "log.csv", self.state.rows)  # kill -9 may have come before it
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        # here and not in __init__: both start from what `resume` loaded
        if self.config.compile:
            self.model.compile()
        self.network = DistributedDataParallel(self.model) if self.world.size > 1 else self.model
        self.bar = tqdm(total=self.steps, initial=self.state.step, unit="step", dynamic_ncols=True,
                        disable=True if self.world.rank else None)  # None: without a terminal
        self.clock.start()
        with self.bar, signals.deferred(), explain_out_of_memory(self.config, self.device):
            self.loop()
        return self.state

    def loop(self):
        while True:
            if self.row_is_due():
                self.make_row()                 # validate, log, save
            if signum := self.signum():
                self.stop(signum)
            if self.state.step >= self.steps:
                return
            self.take_step()                    # forward, backward, step

    def take_step(self):
        config, state = self.config, self.state
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config, self.steps)
        x, y = self.batch(state.step)
        loss, correct = train_step(
            self.network, x, y, self.optimizer, self.scaler, amp=self.amp, weight=self.loss_weight,
            label_smoothing=config.label_smoothing, clip_grad=config.clip_grad)
        state.step += 1
        self.running.add(loss, correct, len(y), state.step)
        self.clock.step()
        self.show_progress()

    def make_row(self):
        """Validate, log, save. If a signal comes meanwhile, the resumed run will make this row."""
        step, config = self.state.step, self.config
        steps_per_s, data_wait = self.clock.read()  # before the validation, which is not timed
        self.count_seconds()
        train_loss, train_acc = self.read_running()
        self.check_loss_scale()
        validation = self.validate()
        if validation is None:
            return
        val_loss, val_acc = validation
        row = {"step": step, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss,
               "val_acc": val_acc, "lr": learning_rate(step - 1, config, self.steps),
               "images_per_s": steps_per_s and steps_per_s * config.batch_size,
               "data_wait": data_wait, "memory_mib": peak_memory_mib(self.device) - self.images_mib,
               "skipped": step - applied_steps(self.optimizer),
               "seconds": self.state.seconds, "flops": self.step_flops * step}
        self.log(row)
        self.keep(row)
        if self.world.rank == 0:
            self.curves.draw(self.state.rows)
        self.clock.start()

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's slice of batch `step` (from 0): x (B, 3, H, W) in [0, 1] and y (B,)."""
        start = time.perf_counter()
        epochs, samples = map(self.world.batch_slice, self.stream.batch(step))
        images, y = self.train_set.batch(samples, self.device)
        flip, angle = draws_for(self.config.seed, epochs, samples, len(self.train_set))
        x = augment(images, flip, angle)
        self.clock.waited += time.perf_counter() - start
        return x, y

    def validate(self) -> tuple[float | None, float | None] | None:
        """Loss and accuracy, (None, None) without validation images, or None after a signal."""
        if len(self.val_set) == 0:
            return None, None
        self.world.broadcast_buffers(self.model)
        result = evaluate(self.model, self.val_set, self.config.batch_size, self.device,
                          classes=len(self.classes), amp=self.amp, stop=self.signum,
                          world=self.world)
        if result is None:
            return None
        loss, acc, self.state.confusion = result
        if not math.isfinite(loss):
            raise self.diverged(f"the validation loss is {loss} at step {self.state.step}")
        return loss, acc

    def log(self, row):
        self.state.rows.append(row)
        self.running.reset()
        self.bar.write(describe(row), file=sys.stdout)

    def keep(self, row):
        """Write best.pt if this row is the best so far, and last.pt."""
        best = self.state.best
        if len(self.val_set) and (best is None or row["val_acc"] > best["val_acc"]):
            self.state.best = row
            self.write("best.pt", {"row": row})
        self.save()

    def save(self):
        """Write last.pt, then log.csv: a copy of the rows in last.pt."""
        running = {"loss": self.running.loss, "correct": self.running.correct}
        self.write("last.pt", {
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "state": vars(self.state) | running})
        if self.world.rank == 0:
            write_csv(self.out / "log.csv", self.state.rows)

    def write(self, name, contents):
        """Write a checkpoint: the weights, their description, and `contents`.

        Raises Diverged, in all ranks, if a weight or moment is not finite.
        """
        tensors = list(self.model.state_dict().values())
        tensors += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        finite = [tensor.isfinite().all() for tensor in tensors
                  if tensor.is_floating_point() and tensor.device == self.device]
        if not torch.stack(finite).all():
            raise self.diverged(f"weights are no longer finite at step {self.state.step}, "
                                "and are not saved")
        if self.world.rank == 0:
            save_checkpoint(self.out / name, {
                "state_dict": self.model.state_dict(), "description": self.description,
                "identity": self.identity, **contents})

    def stop(self, signum):
        """Save between two rows, and raise Interrupted."""
        self.count_seconds()
        if self.state.step > self.last_row_step():
            self.read_running()  # may raise Diverged: then nothing is saved
        self.running.loss = self.world.sum(self.running.loss)
        self.running.correct = self.world.sum(self.running.correct)
        self.world.broadcast_buffers(self.model)
        self.save()
        raise Interrupted(signum, f" at step {self.state.step}; "
                                  f"go on with --out={shell_word(self.out)} --resume auto")

    def count_seconds(self):
        self.state.seconds += self.clock.stop()

    def signum(self) -> int:
        """The signal that came to any rank, or 0."""
        return self.world.max(signals.pending() or 0)

    def last_row_step(self) -> int:
        return self.state.rows[-1]["step"] if self.state.rows else 0

    def row_is_due(self) -> bool:
        step = self.state.step
        due = step % self.config.log_every == 0 or step >= self.steps
        return due and step > self.last_row_step()

    def read_running(self) -> tuple[float, float]:
        """Training loss and accuracy since the last row. Raises Diverged at a non-finite loss."""
        loss, acc = self.running.read(self.world)
        if not math.isfinite(loss):
            first = -self.world.max(-self.running.first_nonfinite.item())
            step = min(first, self.state.step)
            raise self.diverged(f"the training loss is {loss} at step {step:.0f}")
        return loss, acc

    def check_loss_scale(self):
        scale = self.scaler.get_scale()
        if self.scaler.is_enabled() and scale < SMALLEST_SCALE:
            raise self.diverged("every step's gradients overflow in fp16, down to a loss scale of "
                                f"{scale:.1g}, at step {self.state.step}")

    def diverged(self, message: str) -> Diverged:
        message += ": try a smaller --lr, a --warmup or --clip-grad 1"
        last = self.out / "last.pt"
        if self.world.rank == 0 and last.exists():
            message += f"; the last good checkpoint is {last}"
        return Diverged(message)

    def show_progress(self):
        """Advance the bar; when it is redrawn, a few times per second, read the device for it."""
        if self.bar.update():
            loss, acc = self.running.read(World())  # of this rank alone
            images_per_s = (self.bar.format_dict["rate"] or 0) * self.config.batch_size
            text = f"loss {loss:.3f}, acc {acc:.3f}, {images_per_s:,.0f} images/s"
            self.bar.set_postfix_str(text, refresh=False)


class Running:
    """Training loss and accuracy of this rank since the last row, on the device: no step waits."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), dtype=sum_dtype(device), device=device)  # over the images
        self.correct = torch.zeros((), dtype=torch.int64, device=device)   # number of images
        self.images = 0
        self.first_nonfinite = torch.full((), math.inf, device=device)     # step with such a loss

    def add(self, loss: torch.Tensor, correct: torch.Tensor, n: int, step: int) -> None:
        """The mean loss of n images and the number of correct answers, of step `step` (from 1)."""
        self.loss += loss.to(self.loss.dtype) * n
        self.correct += correct
        self.images += n
        first = self.first_nonfinite
        self.first_nonfinite = torch.where(loss.isfinite(), first, first.clamp(max=step))

    def read(self, world: World) -> tuple[float, float]:
        """Mean loss and accuracy over the images of all ranks."""
        sums = torch.stack([self.loss, self.correct.to(self.loss.dtype),
                            torch.full_like(self.loss, self.images)])
        loss, correct, images = world.sum(sums).tolist()
        return loss / images, correct / images

    def reset(self) -> None:
        self.loss.zero_()
        self.correct.zero_()
        self.images = 0


class Clock:
    """Times the training since `start`. The first step of all is a warm-up, and does not count in
    the rates.
    """

    def __init__(self, device: torch.device):
        self.device, self.warm = device, False
        self.start()

    def start(self) -> None:
        self.start_rates()
        self.since = self.begin

    def start_rates(self) -> None:
        self.begin, self.waited, self.steps = self.now(), 0.0, 0

    def stop(self) -> float:
        """Seconds since `start`, the first step included; 0 if stopped already."""
        seconds = 0.0 if self.since is None else self.now() - self.since
        self.since = None
        return seconds

    def step(self) -> None:
        self.steps += 1
        if not self.warm:
            self.warm = True
            self.start_rates()

    def read(self) -> tuple[float, float] | tuple[None, None]:
        """Steps per second and the fraction of time that waited for data; None without a step."""
        seconds = self.now() - self.begin
        return (self.steps / seconds, self.waited / seconds) if self.steps else (None, None)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """The steps that were applied: a GradScaler skips those whose gradients overflow."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


def try_one_batch(model: nn.Module, config: Config, device: torch.device, world: World) -> None:
    """Run forward and backward of a copy of `model`: on a whole batch on a GPU, else on two images.

    Raises InputError if a rank gets too few images, RuntimeError if the memory does not suffice.
    """
    images = config.batch_size // world.size  # of the smallest slice
    if images == 0:
        raise InputError(f"--batch-size {config.batch_size} is less than one image for each of the "
                         f"{world.size} processes")
    # a BatchNorm that is synchronised is of a subclass
    if images == 1 and nn.BatchNorm2d in map(type, model.modules()):
        raise InputError(f"--batch-size {config.batch_size}: BatchNorm needs two images per "
                         f"process; use at least {2 * world.size}"
                         + (", or --sync-bn" if world.size > 1 else ""))
    whole = len(world.batch_slice(range(config.batch_size)))
    count = whole if device.type == "cuda" else min(2, images)
    amp = pick_amp(config.amp, device)
    autocast = torch.autocast(device.type, dtype=amp, enabled=amp is not None)
    with explain_out_of_memory(config, device), autocast:
        x = torch.zeros(count, 3, config.image_size, config.image_size, device=device)
        copy.deepcopy(model).train()(x).float().sum().backward()
