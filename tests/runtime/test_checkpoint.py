import argparse
import os
import pickle
from dataclasses import dataclass

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


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_argparse_beside_the_weights_load(tmp_path, zipped):
    before = set(torch.serialization.get_safe_globals())
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(out="a/b"))
    torch.save({"args": args}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "x.pt") == {"args": args}
    assert set(torch.serialization.get_safe_globals()) == before, "only while it loads"


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    (tmp_path / "x.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError, match="x.pt is not .* Git LFS pointer; `git lfs pull` fetches"):
        load_checkpoint(tmp_path / "x.pt")


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


def test_safetensors_files_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, as timm does")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors")["weight"].tolist() == [1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors is not a readable checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors")
