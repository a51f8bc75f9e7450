import argparse
import collections
import datetime
import os
import pathlib
import pickle
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mixer.runtime.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"<html></html>"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_flipped_bit_that_torch_does_not_see(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"text": "some words"})
    data = path.read_bytes()
    assert data.count(b"some words") == 1
    path.write_bytes(data.replace(b"some words", b"same words"))
    assert load_checkpoint(path) == {"text": "same words"}
    with pytest.raises(ValueError, match="x.pt is not a readable checkpoint: .*data.pkl in it is"):
        load_checkpoint(path, verify=True)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"step": lambda: None})  # a lambda does not pickle
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@dataclass
class Settings:
    """What a training script may save with its weights."""

    lr: float = 0.1


@pytest.mark.parametrize("value", [
    argparse.Namespace(lr=0.1, nested=argparse.Namespace(out=pathlib.PurePosixPath("a/b"))),
    types.SimpleNamespace(lr=0.1), np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True),
    np.str_("Käfer"), datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    datetime.date(2024, 2, 29), datetime.timedelta(1, 2), pathlib.PurePosixPath("/a"),
    pathlib.PureWindowsPath("c:/a"), collections.defaultdict(list, a=[1]),
    collections.OrderedDict(a=1), collections.Counter("aab"), frozenset({1}), slice(1, 2), {1}, b"",
    b"bytes", torch.Size([1, 2]), torch.bfloat16, torch.device("cpu"), torch.__version__,
], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_values_beside_the_weights_load(tmp_path, value, zipped):
    torch.save({"value": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "x.pt")["value"] == value


def test_a_path_of_this_system_and_a_deque_load(tmp_path):
    torch.save({"path": tmp_path, "last": collections.deque([1, 2], 3)}, tmp_path / "x.pt")
    contents = load_checkpoint(tmp_path / "x.pt")
    assert (str(contents["path"]), contents["last"]) == (str(tmp_path), [1, 2])


@pytest.mark.parametrize("array", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(3.0),
    np.arange(3, dtype=">f4"), np.arange(3, dtype=np.float16), np.zeros((0, 3)),
    np.array(["cat", "dog"])], ids=lambda array: f"{array.dtype.str}-{array.shape}")
def test_numpy_arrays_load(tmp_path, array):
    torch.save({"value": array}, tmp_path / "x.pt")
    got = load_checkpoint(tmp_path / "x.pt")["value"]
    assert np.array_equal(got, array) and got.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("array", [
    np.array([{}, 1], dtype=object), np.zeros(2, dtype=[("a", "f4"), ("b", "O")])])
def test_numpy_arrays_of_objects_are_left_empty(tmp_path, array):
    """Their dtype says where pointers are; a crafted one would say it of any bytes."""
    torch.save({"value": array, "weight": torch.ones(1)}, tmp_path / "x.pt")
    contents = load_checkpoint(tmp_path / "x.pt")
    assert len(contents["value"]) == 0 and contents["weight"] == 1


@pytest.mark.parametrize("value, name", [
    (Settings(), "tests.runtime.test_checkpoint.Settings"), (torch.nn.ReLU(), "ReLU"),
    (os.system, "posix.system"), (eval, "eval"), (print, "print"), (getattr, "getattr")])
def test_a_type_that_is_not_loaded_is_named_whole(tmp_path, value, name):
    torch.save({"args": value, "state_dict": {"weight": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError) as e:
        load_checkpoint(tmp_path / "x.pt")
    assert f"{name}, and making one could run code" in str(e.value)
    assert str(e.value).isprintable() and "weights_only" not in str(e.value)


def test_a_file_name_moves_no_cursor(tmp_path):
    path = tmp_path / "\x1b[2Jx.pt"
    for _ in range(2):
        with pytest.raises(ValueError) as e:
            load_checkpoint(path)
        assert r"\x1b[2Jx.pt" in str(e.value) and str(e.value).isprintable()
        path.write_bytes(b"no checkpoint")


def test_types_are_allowed_while_a_file_loads_and_no_longer(tmp_path):
    before = torch.serialization.get_safe_globals()
    save_checkpoint(tmp_path / "x.pt", {"args": argparse.Namespace(lr=0.1)})
    load_checkpoint(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_safetensors_files_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, as timm does")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors")["weight"].tolist() == [1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors is not a readable checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors")
