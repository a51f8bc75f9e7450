"""Checkpoints: atomic save, checked load."""
import io
import os
import zipfile

import torch

from .files import save_atomically


def save_checkpoint(path, contents):
    """Write a dict of tensors and plain values, weights under `state_dict`, atomically.

    In memory first: torch.save does not say why a disk refused it.
    """
    file = io.BytesIO()
    torch.save(contents, file)
    save_atomically(path, lambda temporary: temporary.write_bytes(file.getbuffer()))


def load_checkpoint(path, whole=False):
    """The dict in a file of `save_checkpoint`, or of other people's torch.save, on the CPU. Nothing in it is executed.

    whole: every byte is held against its checksum, which torch.load does not look at and others may not have written.
    Raises ValueError, naming the file, when it is missing, damaged, or not a checkpoint.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        if whole:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zipfile, torch and its unpickler raise nearly every type there is on hostile bytes
        raise ValueError(f"{path} is not a readable checkpoint: {(str(e).strip() or 'empty').splitlines()[0][:120]}") from e
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a dict of weights")
    return contents
