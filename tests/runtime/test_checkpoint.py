import torch
import pytest

from mixer.runtime.checkpoint import load_checkpoint, save_checkpoint
from mixer.models import load_weights
from mixer.models import create_model

SMALL = dict(image_size=32, patch=8, dim=16, depth=2)


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "args": {"lr": 0.1}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
], ids=["plain", "state_dict", "model", "module.", "module._orig_mod.", "lightning"])
def test_reads_other_peoples_checkpoints(tmp_path, wrap):
    theirs, ours = create_model("convmixer", **SMALL), create_model("convmixer", **SMALL)
    torch.save(wrap(theirs.state_dict()), tmp_path / "theirs.pth")
    load_weights(ours, tmp_path / "theirs.pth")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("source, target", [("vit_cnn", "vit_linear"), ("vit_linear", "vit_cnn")])
def test_one_patch_embedding_loads_into_the_other(source, target):
    theirs, ours = create_model(source, **SMALL), create_model(target, **SMALL)
    load_weights(ours, theirs.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_weights_that_do_not_fit_are_named():
    model = create_model("convmixer", **SMALL)
    state = model.state_dict()
    state["head.weight"] = torch.zeros(1000, 16)
    state["extra"] = torch.zeros(1)
    del state["head.bias"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as e:
        load_weights(model, state)
    for part in ("1 missing (head.bias)", "1 unexpected (extra)", "head.weight (1000, 16) for (2, 16)"):
        assert part in str(e.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Hostile:
    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a readable checkpoint"):
        load_checkpoint("evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"<html></html>"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception):
        save_checkpoint(path, {"step": lambda: None})  # a lambda does not pickle: the write fails half-way
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
