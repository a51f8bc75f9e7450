"""The rows that we compare. Nine are those of "Patches are all you need: ViT x ConvMixer", with
what it published about them.

Source: github.com/renatoviolin/Patches-are-all-you-need-ViT-and-ConvMixer (2021). One RTX 2080
(8 GB), 25,000 images at 192x192, fp16, batch 250, 5000 steps, one run per row, training accuracy
only. The memory was read from nvidia-smi.
"""
import csv
from dataclasses import dataclass, field
from pathlib import Path

CURVES = Path(__file__).with_name("published_curves.csv")  # a line per model and 100 steps
EPOCH_IMAGES = 25_000  # the full Dogs vs. Cats training set
ORIGINAL_CLASSES = ["cat", "dog"]
# options of train.py in the original's recipe: only runs with these are compared with the published
# curves; an option that a model does not have is None in its run
ORIGINAL_OPTIONS = {"dim": 512, "heads": 8, "kernel_size": 9, "image_size": 192, "batch_size": 250,
                    "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup": 0,
                    "clip_grad": None, "label_smoothing": 0.0, "log_every": 100, "act": "gelu",
                    "qkv_bias": False, "norm_eps": 1e-5, "init_from": None}


@dataclass(frozen=True)
class Row:
    """One row of the table: what to train, and its published cost, if there is one."""

    title: str
    arch: str
    published_mib: int | None = None      # GPU memory at batch 250, MiB in nvidia-smi
    published_epoch_s: int | None = None  # seconds per epoch of 25,000 images
    options: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return row_name(self.arch, **self.options)


def seed_folder(name: str, seed: int) -> str:
    """The folder of a run among those of other rows and seeds; seed 0 is left out."""
    return f"{name}-seed{seed}" if seed else name


def row_name(arch: str, patch: int | None = None, depth: int | None = None, **_) -> str:
    """The name of a run in folders and tables: `convmixer-p16-d8`. Depth 4 is left out."""
    return arch + (f"-p{patch}" if patch else "") + (f"-d{depth}" if depth not in (None, 4) else "")


ROWS = [
    Row("ResNet-18", "resnet18", 4554, 20),
    Row("EfficientNetV2-B0", "efficientnetv2_b0", 7790, 32),
    Row("ViT 24 Linear", "vit_linear", 3604, 17, {"patch": 24}),
    Row("ViT 24 CNN", "vit_cnn", 3612, 17, {"patch": 24}),
    Row("ConvMixer 24", "convmixer", 2132, 11, {"patch": 24}),
    Row("ViT 16 Linear", "vit_linear", 6768, 33, {"patch": 16}),
    Row("ViT 16 CNN", "vit_cnn", 6788, 34, {"patch": 16}),
    Row("ConvMixer 16", "convmixer", 3150, 17, {"patch": 16}),
    Row("ConvMixer 16/8", "convmixer", 4612, 28, {"patch": 16, "depth": 8}),
    Row("MLP-Mixer 24", "mlp_mixer", options={"patch": 24}),  # not in the original
    Row("MLP-Mixer 16", "mlp_mixer", options={"patch": 16}),
]
BY_NAME = {row.name: row for row in ROWS}
assert len(BY_NAME) == len(ROWS), "two rows have one name"


def published_curves() -> dict[str, list[tuple[int, float, float]]]:
    """{row name: [(step, train loss, train accuracy), ...]}, accuracies as fractions of 1."""
    curves = {}
    with CURVES.open() as f:
        for line in csv.DictReader(f):
            point = int(line["step"]), float(line["train_loss"]), float(line["train_acc"])
            curves.setdefault(line["model"], []).append(point)
    return curves
