"""The checkpoints of a run: which run, which model; save, load, resume from, initialise from."""
import functools
import io
from pathlib import Path

import torch
from torch import nn

from ..data.augment import to_float
from ..data.images import decode
from ..models import MODELS, create_model, load_weights
from ..models.weights import load_checkpoint, match_weights
from ..report.runs import NOT_RECIPE
from ..runtime.distributed import World
from ..runtime.errors import InputError, listed, printable
from ..runtime.files import save_atomically
from .config import Config

FREE_ON_RESUME = NOT_RECIPE - {"seed"}  # a run may continue with others


def save_checkpoint(path: Path | str, contents: dict) -> None:
    """Write a dict of tensors and plain values atomically. The weights are under `state_dict`.

    torch.save writes to memory first, because its own errors do not say why a write failed.
    """
    file = io.BytesIO()
    torch.save(contents, file)
    save_atomically(path, lambda temporary: temporary.write_bytes(file.getbuffer()))


# which model

def describe_model(config: Config, classes: list[str]) -> dict:
    """How to build and feed the model of a checkpoint, as plain values."""
    size = config.image_size
    options = {name: getattr(config, name) for name in MODELS[config.arch].defaults}
    return {"name": config.arch, "options": {**options, "image_size": size}, "classes": classes,
            "preprocessing": f"upright RGB, squeezed to {size}x{size}, x / 255"}


def load_model(path: Path | str) -> nn.Module:
    """The model of a run's best.pt or last.pt, in eval mode, on the CPU.

    It has `classes` (names, in the order of its logits), `image_size` (pixels), `identity` (of its
    run) and `preprocess(file)`: the path or the bytes of an image -> (1, 3, S, S), as in training.
    Raises ValueError if the file is damaged or does not describe its model.
    """
    contents = load_checkpoint(path)
    if "description" not in contents:
        raise ValueError(f"{printable(path)} does not describe its model: build one with "
                         "create_model(...), and load_weights(model, path)")
    description = contents["description"]
    classes, size = description["classes"], description["options"]["image_size"]
    model = create_model(description["name"], num_classes=len(classes), **description["options"])
    load_weights(model, contents)
    model.classes, model.image_size, model.identity = classes, size, contents.get("identity")
    model.preprocess = functools.partial(preprocess, image_size=size)
    return model.eval()


def preprocess(image: bytes | Path | str, image_size: int) -> torch.Tensor:
    """The bytes or the path of an image -> (1, 3, S, S) in [0, 1], upright and squeezed to S x S.

    Raises ValueError if the image does not decode.
    """
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return to_float(torch.tensor(decode(data, image_size))[None])


def init_from_checkpoint(path: Path | str, model: nn.Module, classes: list[str]) -> str:
    """Load the weights that --init-from names into a new model, and say which it took.

    A head of another size or of other classes stays as it is. Raises InputError if the file is
    damaged or its weights do not fit.
    """
    state, fresh = match_weights(model, path, classes)
    model.load_state_dict(state, strict=False)
    return (f"--init-from {printable(path)}: loaded {len(state)} of {len(model.state_dict())} "
            f"tensors ({listed(state, 3)})\nnewly initialised: {listed(fresh) or 'none'}")


# which run

def run_identity(config: Config, images: str, contents: str) -> dict:
    """Plain values that define a run. Two runs with equal values get equal weights, except for
    rounding on another device or with other kernels.

    images, contents: digests of the images' names and sizes, and of their bytes.
    """
    # a constant learning rate does not depend on the number of steps
    free = FREE_ON_RESUME | ({"steps"} if config.schedule == "constant" else set())
    options = {name: value for name, value in vars(config).items() if name not in free}
    init_from = config.init_from and Path(config.init_from).name  # no folder of this machine
    return {**options, "images": images, "contents": contents, "init_from": init_from}


def checkpoint_to_resume(resume: str | None, out: Path, identity: dict,
                         world: World) -> dict | None:
    """The checkpoint that --resume names, or None for a new run; for all ranks.

    Only rank 0 reads the file. Raises InputError if it is damaged, belongs to another run, or is
    missing in the folder of a finished one.
    """
    path = out / "last.pt" if resume == "auto" else resume and Path(resume)
    checkpoint = None
    if resume == "auto" and not path.exists() and (out / "summary.json").exists():
        raise InputError(f"--resume auto: {printable(out)} holds a finished run without its "
                         "last.pt; choose another --out")
    if world.rank == 0 and path and (resume != "auto" or path.exists()):
        checkpoint = load_checkpoint(path)

        # it must be of this run
        saved = checkpoint.get("identity")
        if not isinstance(saved, dict) or "optimizer" not in checkpoint:
            raise InputError("--resume: the checkpoint holds only weights, not the state of a run; "
                             "use last.pt of the run's folder")
        saved = vars(Config()) | saved  # an option that is newer than the checkpoint
        if differences := [f"{key} was {saved.get(key)!r} and is {value!r}"
                           for key, value in identity.items() if saved.get(key) != value]:
            raise InputError("--resume: the checkpoint is of another run: "
                             + ", ".join(differences))

        # without best.pt, best_step would name a checkpoint that is not there
        if checkpoint["state"]["best"] and not (out / "best.pt").exists():
            print(f"no best.pt in {printable(out)}: the best validation accuracy starts anew")
            checkpoint["state"]["best"] = None
    return world.broadcast(checkpoint)
