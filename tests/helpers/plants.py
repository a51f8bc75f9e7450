"""Faults that tests plant inside a command: what happens when it calls a function."""
import itertools
import math
import os
import pkgutil
import time
from dataclasses import dataclass
from pathlib import Path

TRAIN_STEP = "mixer.training.trainer.train_step"


@dataclass
class Plant:
    """Call number `call` of the function `where` sends its process the signal `signum`. `where` is
    the dotted name by which the code under test looks the function up, so a function imported by
    name is planted where it is called, not where it is defined. The signal comes before the call,
    or after it (`after`). Command.wait raises when the planted fault has not happened."""

    where: str
    signum: int
    call: int = 1
    after: bool = False

    def set(self, marker: Path):
        """Replace the function in this process. When the fault happens, `marker` is made."""
        owner, name = self.where.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner)
        function, calls = getattr(owner, name), itertools.count(1)

        def planted(*args, **kwargs):
            if next(calls) != self.call:
                return function(*args, **kwargs)
            return self.happen(lambda: function(*args, **kwargs), args, marker)
        setattr(owner, name, planted)

    def happen(self, call_function, args, marker):
        """What replaces the call; `args` are those of the function."""
        def send():
            marker.touch()
            os.kill(os.getpid(), self.signum)
        if not self.after:
            send()
        result = call_function()
        if self.after:
            send()
        return result


class Hang(Plant):
    """Training step number `step` of the process never ends, and prints "hanging"."""

    def __init__(self, step: int):
        super().__init__(TRAIN_STEP, 0, step)

    def happen(self, call_function, args, marker):
        marker.touch()
        while True:
            print("hanging", flush=True)
            time.sleep(0.1)


class Explode(Plant):
    """After training step number `step` of the process, a weight is not a number."""

    def __init__(self, step: int):
        super().__init__(TRAIN_STEP, 0, step)

    def happen(self, call_function, args, marker):
        result = call_function()
        next(args[0].parameters()).data.fill_(math.nan)
        marker.touch()
        return result
