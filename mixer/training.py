"""The recipe: a plain AMP step, evaluation, and the loop that logs, saves and resumes."""
import contextlib
import dataclasses
import math
import resource
import signal
import sys
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .checkpoint import load_checkpoint, save_checkpoint
from .data.augment import augment, draws_for, to_float
from .data.packed import Stream
from .errors import Diverged, InputError, Interrupted
from .files import write_csv
from .report import describe


def pick_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:N` -> torch.device. Raises InputError listing the devices there are."""
    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = there[min(1, len(there) - 1)]
    name = "cuda:0" if name == "cuda" else name
    if name not in there:
        raise InputError(f"--device {name} is not there; this machine has {', '.join(there)}")
    return torch.device(name)


def pick_amp(name, device):
    """`auto`, `fp16`, `bf16`, `off` -> torch.float16, torch.bfloat16 or None. Raises InputError where the device lacks it."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "off"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16: no fp16 training on the CPU; take --amp off or bf16")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bf16; take --amp fp16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[name]


def make_optimizer(model, lr, weight_decay=0.0):
    """Adam with the default betas; weight decay is decoupled and spares what has one axis: biases and norms."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)  # fused: with a GradScaler, no wait for the device


def applied_steps(optimizer):
    """How many steps the optimizer has made; a GradScaler skips those whose gradients overflowed."""
    for state in optimizer.state.values():
        return int(state["step"].item())
    return 0


def learning_rate(step, config, steps):
    """Of step `step`, counted from 0: linear warm-up, then constant, or half a cosine down to 0 at `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, steps - config.warmup)))


def train_step(model, x, y, optimizer, scaler, *, amp=None, label_smoothing=0.0, clip_grad=None):
    """One optimizer step on float x (B, 3, H, W) and int64 y (B,); amp is the autocast dtype or None.

    Returns the mean loss and the number of correct answers, both on the device: nothing here waits for it.
    """
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
    scaler.scale(loss).backward()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), (logits.argmax(1) == y).sum()


@torch.inference_mode()
def evaluate(model, part, batch_size, device, *, classes, amp=None, stop=lambda: False):
    """Over a Part, each image once: mean loss, accuracy, confusion counts [true][predicted] as nested lists.

    Leaves the model in eval mode. Returns None as soon as `stop()` is true.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for start in range(0, len(part), batch_size):
        if stop():
            return None
        images, y = part.batch(slice(start, start + batch_size), device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(to_float(images)).float()
        loss += F.cross_entropy(logits, y, reduction="sum")
        confusion.index_add_(0, y * classes + logits.argmax(1), torch.ones_like(y))
    confusion = confusion.view(classes, classes).cpu()
    return loss.item() / len(part), confusion.trace().item() / len(part), confusion.tolist()


def peak_memory_mib(device):
    """On CUDA the peak of allocated tensors, on the CPU the peak resident size of the whole process; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def find_checkpoint(resume, out):
    """What --resume names, loaded: a path, or "auto" for out/last.pt; None to start afresh. Raises InputError."""
    if resume is None or (resume == "auto" and not (out / "last.pt").exists()):
        return None
    try:
        return load_checkpoint(out / "last.pt" if resume == "auto" else resume)
    except ValueError as e:
        raise InputError(f"--resume: {e}") from None


class Signals:
    """Inside, Ctrl-C and SIGTERM only set `signum`, for the loop to stop between steps; a second Ctrl-C leaves at once."""

    def __enter__(self):
        self.signum = None
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame):
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


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
    """Train `model` on one Part, validate it on another, and keep log.csv, last.pt and best.pt in the folder `out`.

    `identity` (a dict of plain values) says what the run is: a checkpoint of another one is refused.
    """

    def __init__(self, model, train, val, config, out, *, device, classes, identity):
        self.model, self.train, self.val, self.config, self.out = model, train, val, config, out
        self.device, self.classes, self.identity = device, classes, identity
        if config.batch_size == 1 and any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
            raise InputError("--batch-size 1: BatchNorm has no statistics of a single image; take at least 2")
        self.amp = pick_amp(config.amp, device)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.stream = Stream(len(train), config.batch_size, config.seed)
        self.steps = config.steps if config.epochs is None else self.stream.steps(config.epochs)
        self.state = State(loss=torch.zeros((), dtype=torch.float64, device=device),
                           correct=torch.zeros((), dtype=torch.int64, device=device))
        self.data_mib = train.images.nbytes / 2**20 if train.images.device.type == "cuda" else 0.0
        self.saved, self.save_seconds = -math.inf, 0.0

    def resume(self, checkpoint):
        """Go on from what `save` wrote. Raises InputError when that was another run, naming the difference."""
        there = checkpoint.get("identity", {})
        other = [f"{key} is {there.get(key)!r} there and {value!r} here"
                 for key, value in self.identity.items() if there.get(key) != value]
        if other:
            raise InputError(f"--resume: the checkpoint is of another run: {', '.join(other)}")
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state = State(**checkpoint["state"])
        self.state.loss, self.state.correct = self.state.loss.to(self.device), self.state.correct.to(self.device)

    def fit(self):
        """Train until `steps`; returns the State. Raises Diverged when the loss is not finite, Interrupted after a signal."""
        state = self.state
        if self.config.compile:
            self.model.compile()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.clock = Clock(self.device)
        self.bar = tqdm(total=self.steps, initial=state.step, unit="step", disable=None, dynamic_ncols=True)
        with self.bar, Signals() as signals:
            while True:
                if self.row_is_due():
                    self.make_row(stop=lambda: signals.signum)
                if signals.signum:
                    self.save()
                    raise Interrupted(signals.signum, f"stopped by {signal.Signals(signals.signum).name} at step {state.step}; "
                                                      f"go on with --out {self.out} --resume auto")
                if state.step >= self.steps:
                    return state
                self.take_step()

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
            epochs, samples = self.stream.batch(state.step)
            images, y = self.train.batch(samples, self.device)
            x = augment(images, *draws_for(config.seed, epochs, samples, len(self.train)))
        loss, correct = train_step(self.model, x, y, self.optimizer, self.scaler, amp=self.amp,
                                   label_smoothing=config.label_smoothing, clip_grad=config.clip_grad)
        state.loss += loss.double() * len(y)
        state.correct += correct
        state.step += 1
        self.clock.step()
        if self.bar.update():  # true when the bar is drawn, some times a second: only then is the device read
            loss, acc = self.since_last_row()
            rate = (self.bar.format_dict["rate"] or 0) * config.batch_size
            self.bar.set_postfix_str(f"loss {loss:.3f}, acc {acc:.3f}, {rate:,.0f} images/s", refresh=False)

    def since_last_row(self):
        """Training loss and accuracy over the images since the last row."""
        images = (self.state.step - self.last_row_step()) * self.config.batch_size
        return self.state.loss.item() / images, self.state.correct.item() / images

    def make_row(self, stop):
        """Validate, log and save; when `stop()` comes true meanwhile, do nothing, and the resumed run makes the row."""
        config, state = self.config, self.state
        seconds, data_wait, timed_steps = self.clock.read()
        loss, acc = self.since_last_row()
        if not math.isfinite(loss):
            kept = f"; the last good checkpoint is {self.out / 'last.pt'}" if state.rows else ""
            raise Diverged(f"the training loss is {loss} between steps {self.last_row_step() + 1} and {state.step}: "
                           f"a smaller --lr, --warmup or --clip-grad 1 may help{kept}")
        row = {"step": state.step, "train_loss": loss, "train_acc": acc, "val_loss": None, "val_acc": None}
        if len(self.val):
            measured = evaluate(self.model, self.val, config.batch_size, self.device,
                                classes=self.classes, amp=self.amp, stop=stop)
            if measured is None:
                return
            row["val_loss"], row["val_acc"], state.confusion = measured
        row |= {"lr": learning_rate(state.step - 1, config, self.steps),
                "images_per_s": timed_steps * config.batch_size / seconds if timed_steps else None,
                "data_wait": data_wait,
                "memory_mib": peak_memory_mib(self.device) - self.data_mib,
                "skipped": state.step - applied_steps(self.optimizer)}
        state.rows.append(row)
        state.loss.zero_()
        state.correct.zero_()
        self.bar.write(describe(row), file=sys.stdout)
        sys.stdout.flush()
        if len(self.val) and (state.best is None or row["val_acc"] > state.best["val_acc"]):
            state.best = row
            save_checkpoint(self.out / "best.pt",
                            {"state_dict": self.model.state_dict(), "identity": self.identity, "row": row})
        # saving takes a tenth of the time at most; what a kill -9 loses, the resumed run does again
        if state.step >= self.steps or time.perf_counter() - self.saved > 10 * self.save_seconds:
            self.save()
        self.clock.start()

    def save(self):
        """last.pt, then log.csv, which says nothing that last.pt does not hold."""
        start = time.perf_counter()
        state = {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        save_checkpoint(self.out / "last.pt", {
            "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "identity": self.identity, "state": state})
        write_csv(self.out / "log.csv", self.state.rows)
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - start
