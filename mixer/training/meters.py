"""Running sums and a clock of the training, which no step waits for."""
import time

import torch

from ..runtime.distributed import World


class Running:
    """Training loss and accuracy of this rank since the last row, on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)   # over the images
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)  # number of images
        self.images = 0

    def add(self, loss: torch.Tensor, correct: torch.Tensor, n: int) -> None:
        """The mean loss of n images and the number of correct answers."""
        self.loss += loss.double() * n
        self.correct += correct
        self.images += n

    def read(self, world: World) -> tuple[float, float]:
        """Mean loss and accuracy over the images of all ranks."""
        sums = torch.stack([self.loss, self.correct.double(),
                            torch.full_like(self.loss, self.images)])
        loss, correct, images = world.sum(sums).tolist()
        return loss / images, correct / images


class Clock:
    """Times the steps since `start`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        self.begin, self.waited, self.steps = self.now(), 0.0, 0

    def read(self) -> tuple[float, float]:
        """Steps per second and the fraction of time that waited for data."""
        seconds = self.now() - self.begin
        return self.steps / seconds, self.waited / seconds

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
