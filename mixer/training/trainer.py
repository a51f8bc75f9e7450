"""The loop around the recipe: log, validate, save, stop."""
import contextlib
import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..runtime import signals
from ..runtime.checkpoint import save_checkpoint
from ..data.augment import augment, draws_for
from ..data.batches import Stream
from ..runtime.device import explain_out_of_memory, peak_memory_mib, pick_amp
from ..runtime.distributed import World
from ..runtime.errors import Diverged, InputError, Interrupted
from ..runtime.files import write_csv
from ..report.runs import describe
from .recipe import applied_steps, evaluate, learning_rate, make_optimizer, train_step
from .resume import check_identity

SMALLEST_SCALE = 1e-4  # of the loss in fp16; it starts at 65536 and halves with every step whose gradients overflow


def try_one_batch(model, config, device, world=World()):
    """Forward and backward of a copy of `model`, on a whole batch where that is quick: on a GPU.

    Raises InputError for a batch that gives a process too few images, RuntimeError where memory does not suffice.
    """
    least = config.batch_size // world.size
    if least == 0:
        raise InputError(f"--batch-size {config.batch_size} is less than an image for each of the {world.size} processes")
    synced = config.sync_bn and world.size > 1
    if least == 1 and not synced and any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        raise InputError(f"--batch-size {config.batch_size}: BatchNorm has no statistics of a single image; take at least {2 * world.size}"
                         + (", or --sync-bn" if world.size > 1 else ""))
    count = len(world.batch_slice(range(config.batch_size))) if device.type == "cuda" else min(2, least)
    amp = pick_amp(config.amp, device)
    with explain_out_of_memory(config, device), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        x = torch.zeros(count, 3, config.image_size, config.image_size, device=device)
        copy.deepcopy(model).train()(x).float().sum().backward()


class Clock:
    """Seconds of training since `start`, the device fenced at both ends; the first step of all is warm-up, not counted."""

    def __init__(self, device):
        self.device, self.warm = device, False
        self.start()

    def start(self):
        self._fence()
        self.begin, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_data(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self):
        self.steps += 1
        if not self.warm:
            self.warm = True
            self.start()

    def read(self):
        """(seconds, the share of them spent on data, steps); (None, None, 0) when no step was timed."""
        self._fence()
        seconds = time.perf_counter() - self.begin
        return (seconds, self.waited / seconds, self.steps) if self.steps else (None, None, 0)

    def _fence(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class State:
    """What a checkpoint carries beside model, optimizer and scaler: all that the rest of the run depends on."""

    step: int = 0
    rows: list = dataclasses.field(default_factory=list)   # of the log, one dict each
    best: dict | None = None                               # the first row with the highest validation accuracy
    confusion: list | None = None                          # of the last validation
    loss: torch.Tensor | None = None                       # sum over the images since the last row; on the device
    correct: torch.Tensor | None = None


class Trainer:
    """Train `model` on one Subset, validate it on another, and keep log.csv, last.pt and best.pt in the folder `out`.

    `identity` (a dict of plain values) says what the run is: a checkpoint of another one is refused. Of the processes of
    `world` each takes its share of every batch and holds the same state, but for `loss` and `correct`; the first one writes.
    """

    def __init__(self, model, train, val, config, out, *, device, classes, identity, world=World()):
        self.model, self.train, self.val, self.config, self.out = model, train, val, config, out
        self.device, self.classes, self.identity, self.world = device, classes, identity, world
        self.amp = pick_amp(config.amp, device)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.stream = Stream(len(train), config.batch_size, config.seed)
        self.steps = config.steps if config.epochs is None else self.stream.steps(config.epochs)
        self.share = len(world.batch_slice(range(config.batch_size)))
        self.weight = self.share * world.size / config.batch_size
        self.state = State(loss=torch.zeros((), dtype=torch.float64, device=device),
                           correct=torch.zeros((), dtype=torch.int64, device=device))
        self.first_bad = torch.full((), math.inf, device=device)  # step since the last row whose loss was not finite
        self.data_mib = train.images.nbytes / 2**20 if train.images.device.type == "cuda" else 0.0
        self.saved, self.save_seconds = -math.inf, 0.0

    def resume(self, checkpoint):
        """Go on from what `save` wrote. Raises InputError when that was another run, or is no such thing."""
        check_identity(checkpoint, self.identity)
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            if checkpoint["state"].keys() != vars(self.state).keys():
                raise KeyError("its state has other fields")
            self.state = State(**checkpoint["state"])
            self.state.loss, self.state.correct = (t.to(self.device) if self.world.rank == 0 else torch.zeros_like(t, device=self.device)
                                                   for t in (self.state.loss, self.state.correct))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise InputError(f"--resume: the checkpoint does not fit this run: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e

    def fit(self):
        """Train until `steps`; returns the State. Raises Diverged when loss or weights are not finite, Interrupted after a signal."""
        if self.state.rows and self.world.rank == 0:
            write_csv(self.out / "log.csv", self.state.rows)  # a kill -9 may have come between last.pt and it
        if self.config.compile:
            self.model.compile()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.network = self.model if self.world.size == 1 else DistributedDataParallel(
            self.model, device_ids=None if self.device.type == "cpu" else [self.device])
        self.clock = Clock(self.device)
        self.bar = tqdm(total=self.steps, initial=self.state.step, unit="step", dynamic_ncols=True,
                        disable=True if self.world.rank else None)
        with self.bar, signals.deferred(), explain_out_of_memory(self.config, self.device):
            self.loop()
        return self.state

    def loop(self):
        state = self.state
        while True:
            if self.row_is_due():
                self.make_row()
            if signum := self.signum():
                self.save_between_rows()
                raise Interrupted(signum, f" at step {state.step}; go on with --out {self.out} --resume auto")
            if state.step >= self.steps:
                return
            self.take_step()

    def signum(self):
        """The signal that came, to whichever process, or 0."""
        return self.world.max(signals.pending() or 0)

    def last_row_step(self):
        return self.state.rows[-1]["step"] if self.state.rows else 0

    def row_is_due(self):
        step = self.state.step
        return step > self.last_row_step() and (step % self.config.log_every == 0 or step >= self.steps)

    def take_step(self):
        config, state = self.config, self.state
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config, self.steps)
        with self.clock.waiting_for_data():
            epochs, samples = map(self.world.batch_slice, self.stream.batch(state.step))
            images, y = self.train.batch(samples, self.device)
            x = augment(images, *draws_for(config.seed, epochs, samples, len(self.train)))
        loss, correct = train_step(self.network, x, y, self.optimizer, self.scaler, amp=self.amp, weight=self.weight,
                                   label_smoothing=config.label_smoothing, clip_grad=config.clip_grad)
        state.loss += loss.double() * len(y)
        state.correct += correct
        state.step += 1
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=state.step))
        self.clock.step()
        if self.bar.update():  # true when the bar is drawn, some times a second: only then is the device read
            images = (state.step - self.last_row_step()) * self.share
            rate = (self.bar.format_dict["rate"] or 0) * config.batch_size
            self.bar.set_postfix_str(f"loss {state.loss.item() / images:.3f}, acc {state.correct.item() / images:.3f}, "
                                     f"{rate:,.0f} images/s", refresh=False)

    def since_last_row(self):
        """Training loss and accuracy over the images since the last row. Raises Diverged when that loss is not finite."""
        state = self.state
        images = (state.step - self.last_row_step()) * self.config.batch_size
        loss, correct = self.world.sum(torch.stack([state.loss, state.correct.double()])).tolist()
        if not math.isfinite(loss):
            first = -self.world.max(-int(min(self.first_bad.item(), state.step)))
            raise self.diverged(f"the training loss is {loss / images} at step {first}")
        return loss / images, int(correct) / images

    def diverged(self, what):
        kept = f"; the last good checkpoint is {self.out / 'last.pt'}" if self.world.rank == 0 and (self.out / "last.pt").exists() else ""
        return Diverged(f"{what}: a smaller --lr, --warmup or --clip-grad 1 may help{kept}")

    def make_row(self):
        """Validate, log and save; when a signal comes meanwhile, do nothing, and the resumed run makes the row."""
        config, state = self.config, self.state
        seconds, data_wait, timed_steps = self.clock.read()
        loss, acc = self.since_last_row()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise self.diverged(f"every step's gradients overflow in fp16, down to a loss scale of {self.scaler.get_scale():.1g}, "
                                f"at step {state.step}")
        row = {"step": state.step, "train_loss": loss, "train_acc": acc, "val_loss": None, "val_acc": None}
        if len(self.val):
            self.world.broadcast_buffers(self.model)
            measured = evaluate(self.model, self.val, config.batch_size, self.device,
                                classes=self.classes, amp=self.amp, stop=self.signum, world=self.world)
            if measured is None:
                return
            row["val_loss"], row["val_acc"], state.confusion = measured
            if not math.isfinite(row["val_loss"]):
                raise self.diverged(f"the validation loss is {row['val_loss']} at step {state.step}")
        row |= {"lr": learning_rate(state.step - 1, config, self.steps),
                "images_per_s": timed_steps * config.batch_size / seconds if timed_steps else None,
                "data_wait": data_wait,
                "memory_mib": peak_memory_mib(self.device) - self.data_mib,
                "skipped": state.step - applied_steps(self.optimizer)}
        state.rows.append(row)
        state.loss.zero_()
        state.correct.zero_()
        self.bar.write(describe(row), file=sys.stdout)
        self.hint(row)
        sys.stdout.flush()
        if len(self.val) and (state.best is None or row["val_acc"] > state.best["val_acc"]):
            state.best = row
            self.write("best.pt", {"state_dict": self.model.state_dict(), "identity": self.identity, "row": row})
        # saving takes a tenth of the time at most; what a kill -9 loses, the resumed run does again
        if state.step >= self.steps or time.perf_counter() - self.saved > 10 * self.save_seconds:
            self.save()
        self.clock.start()

    def hint(self, row):
        """In the first row after a third of the run, say where validation is no better than always giving the most frequent answer."""
        before = self.state.rows[-2]["step"] if len(self.state.rows) > 1 else 0
        if row["val_acc"] is None or not 3 * before < self.steps <= 3 * row["step"]:
            return
        majority = max(map(sum, self.state.confusion)) / len(self.val)
        if row["val_acc"] <= majority + 2 * math.sqrt(majority * (1 - majority) / len(self.val)):  # two standard errors
            self.bar.write(f"hint: after a third of the run, validation accuracy {row['val_acc']:.3f} is not clearly above the "
                           f"{majority:.3f} of always giving one answer: try another --lr or more --steps, or look at the labels",
                           file=sys.stdout)

    def save_between_rows(self):
        """`save`, where the sums since the last row lie in several processes; then the run must stop."""
        if self.state.step > self.last_row_step():
            self.since_last_row()
        self.state.loss, self.state.correct = self.world.sum(self.state.loss), self.world.sum(self.state.correct)
        self.world.broadcast_buffers(self.model)
        self.save()

    def save(self):
        """last.pt, then log.csv, which says nothing that last.pt does not hold."""
        start = time.perf_counter()
        state = {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        self.write("last.pt", {
            "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "identity": self.identity, "state": state})
        if self.world.rank == 0:
            write_csv(self.out / "log.csv", self.state.rows)
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - start

    def write(self, name, contents):
        """A checkpoint, by the first process, unless something in it is not finite: a good one is never overwritten by a bad one.
        Raises Diverged then, in all processes."""
        tensors = [*self.model.state_dict().values(), *(t for state in self.optimizer.state.values() for t in state.values())]
        if not torch.stack([t.isfinite().all() for t in tensors if t.is_floating_point() and t.device == self.device]).all():
            raise self.diverged(f"weights are no longer finite at step {self.state.step}, and are not saved")
        if self.world.rank == 0:
            save_checkpoint(self.out / name, contents)
