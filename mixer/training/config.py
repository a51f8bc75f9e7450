"""Every option of train.py in one frozen dataclass. The command line is made from it."""
from dataclasses import dataclass, replace

from ..experiments import BY_NAME, row_name, seed_folder
from ..models import MODELS, model_options
from ..runtime.cli import flag, option, parse, parse_names, whole_numbers
from ..runtime.errors import InputError

MODEL_OPTIONS = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.defaults))


@dataclass(frozen=True)
class Config:
    """The defaults are the original's, plus a validation set."""

    # model
    arch: str = option("vit_cnn", "model; all: each row of the comparison",
                       choices=(*MODELS, "all"))
    rows: str | None = option(None, "with --arch all: only these, e.g. resnet18,convmixer-p24")
    patch: int | None = option(None, "side in pixels, must divide the image; original: 24", least=1)
    dim: int | None = option(None, "channels per patch; original: 512", least=1)
    depth: int | None = option(None, "blocks; original: 4", least=1)
    heads: int | None = option(None, "attention heads (ViT), must divide dim; original: 8", least=1)
    kernel_size: int | None = option(None, "kernel side (ConvMixer), odd; original: 9", least=1)
    act: str | None = option(None, "activation (ConvMixer): gelu (original, fused) or relu")
    qkv_bias: bool | None = option(None, "biases of queries, keys and values (ViT), as timm's")
    norm_eps: float | None = option(None, "eps of LayerNorm (ViT); timm's: 1e-6", above=0)
    init_from: str | None = option(None, "checkpoint to start from: ours, timm's, torchvision's")
    # images
    image_size: int = option(192, "side in pixels; images are squeezed to a square", least=1)
    data: str | None = option(None, "image folder or zip; default: a demo with small settings")
    cache: str | None = option(None, "folder for decoded images; default: ~/.cache/vit-convmixer")
    val_fraction: float | None = option(None, "fraction of each class held out for validation; "
                                        "default: 0.1; original: 0", least=0, below=1)
    bad_images: str = option("report", "damaged images: report all and stop, or skip them",
                             choices=("report", "skip"))
    # machine
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: cuda if there is one")
    amp: str = option("auto", "autocast dtype; auto: fp16 on CUDA, bf16 on a CPU that has it",
                      choices=("auto", "fp16", "bf16", "off"))
    # recipe
    batch_size: int = option(250, "images per step, over all ranks", least=1)
    steps: int = option(5000, "optimizer steps", least=1)
    lr: float = option(1e-4, "learning rate of Adam", above=0)
    weight_decay: float = option(0.0, "decoupled (AdamW); not on biases and norms", least=0)
    schedule: str = option("constant", "learning rate after the warm-up; cosine: down to 0",
                           choices=("constant", "cosine"))
    warmup: int = option(0, "steps of linear warm-up", least=0)
    clip_grad: float | None = option(None, "largest gradient norm; default: no limit", above=0)
    label_smoothing: float = option(0.0, "label fraction spread over classes", least=0, below=1)
    sync_bn: bool = option(False, "BatchNorm over the batch of all ranks; ConvMixer runs unfused")
    compile: bool = option(False, "torch.compile the model")
    kernels: str = option("auto", "ConvMixer's depthwise unit; auto: fused; torch: plain PyTorch",
                          choices=("auto", "torch"))
    seed: int = option(0, "seed of initialisation, split, order and augmentation", least=0,
                       below=2**64)
    seeds: str | None = option(None, "train one run per seed, e.g. 0,1,2; excludes --seed")
    # run
    log_every: int = option(100, "steps per log entry; each validates and saves", least=1)
    out: str | None = option(None, "folder of the results; default: a new one in runs/")
    resume: str | None = option(None, "checkpoint to continue from; auto: last.pt in --out, if any")
    debug: bool = option(False, "print a traceback when something fails")

    @property
    def model_options(self) -> dict:
        """Those of create_model. None: the model has no such option, or takes its default."""
        return {name: getattr(self, name) for name in MODEL_OPTIONS}

    def __str__(self):
        """The options that differ from the defaults, those of the model included."""
        usual = vars(Config()) | (MODELS[self.arch].defaults if self.arch in MODELS else {})
        return ", ".join(f"{name} {value}" for name, value in vars(self).items()
                         if value != usual[name])


# the defaults of a run without --data
DEMO = dict(image_size=96, batch_size=16, steps=450, lr=2e-4, schedule="cosine", warmup=40,
            clip_grad=1)


def read_config(argv: list[str], description: str) -> tuple[Config, list[tuple]]:
    """argv -> Config, checked, with the model's defaults; and its `several_runs`, [] for one run.

    Raises InputError.
    """
    values = parse(Config, argv, description)
    config = Config(**{**({} if "data" in values else DEMO), **values})

    # options that do not go together
    several = config.arch == "all" or config.seeds is not None
    given = [flag(name) for name in ("init_from", *MODEL_OPTIONS) if name in values]
    for wrong, problem in (
            ("seed" in values and "seeds" in values, "--seed and --seeds exclude each other"),
            (config.resume == "auto" and config.out is None,
             "--resume auto needs --out, the folder of the run"),
            (several and config.resume not in (None, "auto"),
             "--resume must be auto where there are several runs"),
            (config.rows and config.arch != "all", "--rows needs --arch all"),
            (given and config.arch == "all", f"{', '.join(given)}: only with one --arch")):
        if wrong:
            raise InputError(problem)

    # those of the model
    if config.arch != "all":
        try:
            config = replace(config, **model_options(config.arch, config.image_size,
                                                     **config.model_options))
        except ValueError as e:
            raise InputError(str(e)) from None
    return config, several_runs(config) if several else []


def several_runs(config: Config) -> list[tuple[str, str, list[str]]]:
    """One (title, folder in --out, arguments) per run of `--arch all` or `--seeds`, seed by seed.

    The arguments lack --out and --resume. A single seed given by --seed does not change folder
    names. The folders of --seeds depend only on row and seed, so that a later call with more seeds
    continues them. Raises InputError.
    """
    name = row_name(config.arch, config.patch, config.depth)
    # each row, or the one model
    runs = [(name, name, {})]
    if config.arch == "all":
        runs = [(row.title, row.name, {"arch": row.arch, **row.options})
                for row in parse_names("rows", config.rows, BY_NAME)]
    # each with each seed
    if config.seeds is not None:
        runs = [(f"{title}, seed {seed}", seed_folder(name, seed), {**options, "seed": seed})
                for seed in whole_numbers("seeds", config.seeds, least=0)
                for title, name, options in runs]
    shared = dict.fromkeys(["rows", "seeds", "out", "resume"])
    return [(title, folder, as_arguments(config, **shared, **options))
            for title, folder, options in runs]


def as_arguments(config: Config, **changes) -> list[str]:
    """The command line that gives this config, with some options changed."""
    return [flag(name) + ("" if value is True else f"={value}")
            for name, value in {**vars(config), **changes}.items()
            if value is not None and value is not False]
