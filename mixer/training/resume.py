"""May this run go on from that checkpoint?"""
import hashlib
import os
from pathlib import Path

from ..runtime.checkpoint import load_checkpoint
from ..runtime.distributed import World
from ..runtime.errors import InputError
from .config import Config

# options that change no weight: they may differ between a run and its continuation
FREE_ON_RESUME = {"data", "log_every", "cache", "bad_images", "data_on_device", "device",
                  "kernels", "require_acc", "out", "resume", "debug", "init_from", "rows", "seeds"}


def resume_identity(config: Config, images: str) -> dict:
    """Plain values that define a run; `images`, a digest of names and sizes, is one of them."""
    # a constant learning rate does not depend on the number of steps
    free = FREE_ON_RESUME | ({"steps", "epochs"} if config.schedule == "constant" else set())
    options = {name: value for name, value in vars(config).items() if name not in free}
    return {**options, "images": images, "init_from": _fingerprint(config.init_from)}


def _fingerprint(path):
    """Of a file's bytes; None without a file: what a run started from may be gone."""
    if path is None or not os.path.isfile(path) or not os.access(path, os.R_OK):
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def open_checkpoint(resume: str | None, out: Path, identity: dict, world: World) -> dict | None:
    """The checkpoint that a run goes on from, or None if it starts afresh; the same for all ranks.

    Only rank 0 reads the file. Raises InputError if it is damaged or belongs to another run. A run
    goes on without the file that it was started from (--init-from); with another one it does not.
    """
    checkpoint = world.broadcast(find_checkpoint(resume, out) if world.rank == 0 else None)
    if checkpoint is None:
        return None
    saved = checkpoint.get("identity")
    if not isinstance(saved, dict) or "optimizer" not in checkpoint:
        raise InputError("--resume: the checkpoint holds only weights, not the state of a run; "
                         "use last.pt of the run's folder")
    if identity.get("init_from") is None:
        identity["init_from"] = saved.get("init_from")
    check_identity(checkpoint, identity)
    return checkpoint


def check_identity(checkpoint: dict, identity: dict) -> None:
    """Raise InputError if the run of `checkpoint` differs in one of these values."""
    saved = checkpoint["identity"]
    differences = [f"{key} was {saved.get(key)!r} and is {value!r}"
                   for key, value in identity.items() if saved.get(key) != value]
    if differences:
        raise InputError(f"--resume: the checkpoint is of another run: {', '.join(differences)}")


def find_checkpoint(resume: Path | str | None, out: Path) -> dict | None:
    """Load the checkpoint that --resume names: a path, or "auto" for out/last.pt if it exists."""
    if resume is None or (resume == "auto" and not (out / "last.pt").exists()):
        return None
    try:
        return load_checkpoint(out / "last.pt" if resume == "auto" else resume, verify=True)
    except ValueError as e:
        raise InputError(f"--resume: {e}") from None
