"""May this run go on from that checkpoint?"""
import dataclasses

from ..runtime.checkpoint import load_checkpoint
from ..runtime.errors import InputError

# options that change no weight: a resumed run may have others
FREE_ON_RESUME = {"data", "log_every", "cache", "workers", "bad_images", "data_on_device", "device", "kernels", "require_acc", "out",
                  "resume", "debug"}


def resume_identity(config, data):
    """What a run is, as plain values: runs with equal identities have equal weights at equal steps."""
    free = FREE_ON_RESUME | ({"steps", "epochs"} if config.schedule == "constant" else set())
    return {**{name: value for name, value in dataclasses.asdict(config).items() if name not in free}, "images": data}


def find_checkpoint(resume, out):
    """What --resume names, loaded: a path, or "auto" for out/last.pt; None to start afresh. Raises InputError."""
    if resume is None or (resume == "auto" and not (out / "last.pt").exists()):
        return None
    try:
        return load_checkpoint(out / "last.pt" if resume == "auto" else resume, whole=True)
    except ValueError as e:
        raise InputError(f"--resume: {e}") from None


def check_identity(checkpoint, identity):
    """Raise InputError where a checkpoint is of another run, naming the differences."""
    there = checkpoint.get("identity")
    if not isinstance(there, dict) or "optimizer" not in checkpoint:
        raise InputError("--resume: the checkpoint holds weights, not the state of a run; last.pt in the run's folder does")
    other = [f"{key} is {there.get(key)!r} there and {value!r} here" for key, value in identity.items() if there.get(key) != value]
    if other:
        raise InputError(f"--resume: the checkpoint is of another run: {', '.join(other)}")
