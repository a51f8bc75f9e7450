"""Checkpoints: atomic save, checked load."""
import io
import os
import zipfile
from pathlib import Path

import torch

from .files import save_atomically


def save_checkpoint(path: Path | str, contents: dict) -> None:
    """Write a dict of tensors and plain values atomically. The weights are under `state_dict`.

    torch.save writes to memory first, because it does not say why a disk refuses a file.
    """
    file = io.BytesIO()
    torch.save(contents, file)
    save_atomically(path, lambda temporary: temporary.write_bytes(file.getbuffer()))


def load_checkpoint(path: Path | str, verify: bool = False) -> dict:
    """The dict in a file of `save_checkpoint` or of another torch.save, on the CPU.

    Nothing in the file is executed. verify: compare every byte with its checksum, which torch.load
    does not do. Raises ValueError, naming the file, if it is missing, damaged or no checkpoint.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        if verify:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # hostile bytes raise nearly every exception type
        reason = (str(e).strip() or "empty").splitlines()[0][:120]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from e
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a dict of weights")
    return contents
