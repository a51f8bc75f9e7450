"""Files of weights: written whole or not at all, read without executing anything."""
import argparse
import io
import re
import zipfile
from pathlib import Path

import torch

from .errors import printable
from .files import save_atomically


def save_checkpoint(path: Path | str, contents: dict) -> None:
    """Write a dict of tensors and plain values atomically. The weights are under `state_dict`.

    torch.save writes to memory first, because it does not say why a disk refuses a file.
    """
    file = io.BytesIO()
    torch.save(contents, file)
    save_atomically(path, lambda temporary: temporary.write_bytes(file.getbuffer()))


def load_checkpoint(path: Path | str, verify: bool = False) -> dict:
    """The dict in a file of `save_checkpoint`, of another torch.save or of safetensors, on the CPU.

    Nothing in the file is executed: it may hold tensors, plain values and argparse.Namespace.
    verify: compare every byte with its checksum, which torch.load does not do. Raises ValueError,
    naming the file and the reason, if it is missing, damaged or no checkpoint.
    """
    path, shown = Path(path), printable(path)
    if not path.exists():
        raise ValueError(f"there is no checkpoint {shown}")
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file")
        if verify:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        if path.suffix == ".safetensors":  # what timm downloads
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # hostile bytes raise nearly every exception type
        raise ValueError(f"{shown} is not a readable checkpoint: {_reason(e)}") from e
    if not isinstance(contents, dict):
        raise ValueError(f"{shown} holds a {type(contents).__name__}, not a dict of weights")
    return contents


def _reason(e):
    """Why torch.load refuses a file, without its advice to unpickle whatever the file holds."""
    text = str(e)
    if named := re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", text, flags=re.S):
        return (f"it holds a {printable(named[1])}, and making one could run code; save it again "
                "with the state dict and plain values alone")
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return printable((text.strip() or type(e).__name__).splitlines()[0])
