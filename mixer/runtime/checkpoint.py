"""Checkpoints: atomic save, checked load."""
import argparse
import collections
import datetime
import io
import os
import pathlib
import re
import types
import zipfile
from pathlib import Path

import numpy as np
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

    Nothing in the file is executed: beside tensors and plain values, only HARMLESS types are made.
    verify: compare every byte with its checksum, which torch.load does not do. Raises ValueError,
    naming the file and the reason, if it is missing, damaged, no checkpoint, or holds other types.
    """
    shown = printable(path)
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {shown}")
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        if verify:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        if Path(path).suffix == ".safetensors":  # what timm downloads
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([(made, name) for name, made in HARMLESS.items()]):
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


# What other programs write beside the weights, and what is made of it. Most are the types
# themselves. The others are replaced: a crafted NumPy dtype can describe pointers, and the reader
# of torch fills no other dict than its own.

class _DType:
    """The dtype of a pickled NumPy array or scalar, of numbers or text; `dtype` is else None."""

    def __init__(self, code, *_):
        plain = isinstance(code, str) and re.fullmatch(r"(b1|[iuf][1248]|c8|c16|[SU]\d+)", code)
        self.dtype = np.dtype(code) if plain else None

    def __setstate__(self, state):
        if self.dtype is not None and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A pickled NumPy array; empty if it is not of numbers or text."""

    def __new__(cls, *_):
        return super().__new__(cls, (0,))

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, data = state
        if dtype.dtype is not None:
            super().__setstate__((1, shape, dtype.dtype, fortran_order, data))


def _numpy_scalar(dtype, data=None):
    return None if dtype.dtype is None else np.frombuffer(data, dtype.dtype)[0]


class _Dict:
    """Makes an OrderedDict instead of another dict type."""

    def __new__(cls, *_):
        return collections.OrderedDict()


def _list(*_):
    return []


def _empty_bytes():
    return b""


class _Type:
    """Stands for a type that is only mentioned, as in defaultdict(list)."""


HARMLESS = {f"{t.__module__}.{t.__qualname__}": t for t in (
    argparse.Namespace, types.SimpleNamespace, frozenset, slice, datetime.datetime, datetime.date,
    datetime.time, datetime.timedelta, datetime.timezone)}
HARMLESS |= {f"builtins.{t}": _Type for t in ("bool", "dict", "float", "int", "list", "str",
                                              "tuple")}
HARMLESS |= {f"{module}.{kind}{system}Path": getattr(pathlib, f"Pure{system}Path")
             for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")
             for system in ("Posix", "Windows")}
HARMLESS |= {name: _Dict for name in (
    "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "munch.Munch",
    "yacs.config.CfgNode", "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict")}
HARMLESS |= {"builtins.bytes": _empty_bytes, "collections.deque": _list,
             "torch.torch_version.TorchVersion": str,
             "numpy.dtype": _DType, "numpy.ndarray": _Array}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
    HARMLESS |= {f"{_module}.scalar": _numpy_scalar, f"{_module}._reconstruct": _Array}
