"""A small Trainer in this process, and its images."""
import numpy as np
import torch

from mixer.data.batches import Subset
from mixer.runtime.distributed import World
from mixer.training.checkpoint import describe_model
from mixer.training.config import Config
from mixer.training.trainer import Trainer
from tests.helpers.networks import tiny_convmixer

SMALL = Config(arch="convmixer", image_size=32, batch_size=8, steps=9, log_every=3, lr=1e-3, seed=1)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def subsets():
    """Two classes that differ in which half is bright; the last ten images are for validation."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 128, (40, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % 2
    images[labels == 0, :16] += 100
    images[labels == 1, 16:] += 100
    indices = np.arange(len(images))
    return Subset(images, labels, indices[:-10]), Subset(images, labels, indices[-10:])


def trainer(out, config=SMALL, amp=None, model=None):
    torch.manual_seed(config.seed)
    return Trainer(model or tiny_convmixer(), *subsets(), config, out, device=torch.device("cpu"),
                   amp=amp, description=describe_model(config, ["cat", "dog"]),
                   identity=vars(config), world=World())
