import pickle

import pytest

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
