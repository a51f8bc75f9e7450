"""Every option of train.py in one frozen dataclass; the command line is made from it."""
import dataclasses
from dataclasses import dataclass

from ..runtime.cli import option, parse, invalid_values
from ..runtime.errors import UsageError
from ..models import MODELS, model_options

MODEL_OPTIONS = ("patch", "dim", "depth", "heads", "kernel_size")


@dataclass(frozen=True)
class Config:
    """Every option of train.py. The defaults are the original experiment's, plus a validation set."""

    arch: str = option("vit_cnn", "model, or all: the nine rows of the original table", choices=(*MODELS, "all"))
    patch: int | None = option(None, "patch side in pixels, must divide the image; original: 24")
    dim: int | None = option(None, "channels per patch; original: 512")
    depth: int | None = option(None, "blocks; original: 4")
    heads: int | None = option(None, "attention heads (ViT), must divide dim; original: 8")
    kernel_size: int | None = option(None, "depthwise kernel side (ConvMixer), odd; original: 9")
    image_size: int = option(192, "images are squeezed to this many pixels square", least=1)
    data: str | None = option(None, "image folder or zip; without it, a drawn demo and demo-sized settings")
    cache: str | None = option(None, "folder for decoded images; default: vit-convmixer in the user's cache folder")
    val_fraction: float = option(0.1, "share of each class held out for validation; 0: none, as the original", least=0, below=1)
    bad_images: str = option("report", "damaged images: report them all and stop, or leave them out", choices=("report", "skip"))
    workers: int | None = option(None, "processes that decode; default: one a core", least=1)
    data_on_device: str = option("auto", "keep all images in GPU memory; auto: where they take less than half of what is free",
                                 choices=("auto", "yes", "no"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: the GPU where there is one")
    amp: str = option("auto", "autocast dtype; auto: fp16 on CUDA, off on the CPU", choices=("auto", "fp16", "bf16", "off"))
    batch_size: int = option(250, "images per step", least=1)
    steps: int = option(5000, "optimizer steps", least=1)
    epochs: float | None = option(None, "passes over the training images, instead of --steps", above=0, below=1e9)
    lr: float = option(1e-4, "learning rate of Adam", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW), on weights with two or more axes", least=0)
    schedule: str = option("constant", "learning rate after the warm-up; cosine: down to 0", choices=("constant", "cosine"))
    warmup: int = option(0, "steps of linear warm-up", least=0)
    clip_grad: float | None = option(None, "largest norm of the whole gradient; default: no limit", above=0)
    label_smoothing: float = option(0.0, "share of each label spread over all classes", least=0, below=1)
    sync_bn: bool = option(False, "BatchNorm over the whole batch of all processes (torchrun), not over each one's part")
    compile: bool = option(False, "torch.compile the model")
    kernels: str = option("auto", "ConvMixer's depthwise unit: fused (auto; triton: in Triton or not at all) or in plain PyTorch",
                          choices=("auto", "torch", "triton"))
    seed: int = option(0, "of initialisation, split, order and augmentation", least=0)
    log_every: int = option(100, "steps between rows of the log, each with a validation", least=1)
    require_acc: float | None = option(None, "fail (exit code 1) when the final accuracy is below this share", least=0, most=1)
    out: str | None = option(None, "folder of the results; default: a new one in runs/")
    resume: str | None = option(None, "auto: go on with --out where it stopped, or start; PATH: a checkpoint to go on from")
    debug: bool = option(False, "show a traceback when something fails")


# what a run without --data takes where the command line does not say otherwise
DEMO = dict(image_size=96, batch_size=16, steps=450, lr=2e-4, schedule="cosine", warmup=40, clip_grad=1.0)


def read_config(argv, description):
    """argv -> Config, checked and with the model's defaults filled in. Raises UsageError naming all that is wrong."""
    given, wrong = parse(Config, argv, description)
    demo = {} if "data" in given else DEMO
    config = Config(**{**demo, **given})
    wrong += invalid_values(config)
    if "steps" in given and "epochs" in given:
        wrong.append("--steps and --epochs exclude each other")
    if config.resume == "auto" and config.out is None:
        wrong.append("--resume auto needs --out, the folder to go on with")
    options = {name: getattr(config, name) for name in MODEL_OPTIONS}
    if config.arch == "all":
        wrong += [f"--arch all sets --{name.replace('_', '-')} itself" for name, value in options.items() if value is not None]
    elif config.arch in MODELS:
        try:
            config = dataclasses.replace(config, **model_options(config.arch, config.image_size, **options))
        except ValueError as e:
            wrong += str(e).split("; ")
    if wrong:
        raise UsageError(wrong)
    return config


def as_arguments(config, **changes):
    """The command line that gives this config, with some options changed."""
    options = {**dataclasses.asdict(config), **changes}
    if options["epochs"] is not None:
        del options["steps"]
    return [word for name, value in options.items() if value is not None and value is not False
            for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))]
