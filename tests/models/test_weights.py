"""Checkpoints: whose files and weights load, what is refused, what is said."""
import argparse
import os

import pytest
import torch
from torch import nn

from mixer.models import create_model, load_weights
from mixer.models.weights import load_checkpoint, match_weights, resample_positions
from tests.helpers.networks import IMAGE_SIZE, TINY, randomise, relative_error, tiny_convmixer

VIT = dict(image_size=IMAGE_SIZE, patch=8, dim=16, depth=2, heads=4)


# files

@pytest.mark.parametrize("content, reason", [
    (b"", ""), (b"PK\x03\x04 not really", ""), (b"some text", ""),
    (b"<!DOCTYPE html>\n<html>", "it is a web page"), (b"\n<html></html>", "it is a web page"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file; only PyTorch's"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
     "it is a Git LFS pointer; `git lfs pull` fetches the file")])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, reason):
    """In one line, whatever its name, and without torch's advice to load it unsafely."""
    path = tmp_path / "\x1b[2Jx.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as e:
        load_checkpoint(path)
    text = str(e.value)
    assert text.isprintable() and r"\x1b[2Jx.pt is not a readable checkpoint: " in text
    assert reason in text and "weights_only" not in text


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_file_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="it is a TorchScript file; save the state dict"):
        load_checkpoint(tmp_path / "x.pt")


class Settings:
    """What a training script may save with its weights."""


@pytest.mark.parametrize("value, name", [
    (Settings(), "tests.models.test_weights.Settings"), (nn.ReLU(), "ReLU"),
    (os.system, "posix.system"), (getattr, "getattr")])
def test_a_type_that_is_not_loaded_is_named(tmp_path, value, name):
    torch.save({"args": value, "state_dict": {"weight": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError) as e:
        load_checkpoint(tmp_path / "x.pt")
    assert f"{name} " in str(e.value)
    assert str(e.value).isprintable() and "weights_only" not in str(e.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_argparse_beside_the_weights_load(tmp_path, zipped):
    before = set(torch.serialization.get_safe_globals())
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(out="a/b"))
    torch.save({"args": args}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "x.pt") == {"args": args}
    assert set(torch.serialization.get_safe_globals()) == before, "only while it loads"


def test_safetensors_files_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, as timm does")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors")["weight"].tolist() == [1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors is not a readable checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors")


# weights

def same_weights(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def averaged(state):
    """The state dict of an AveragedModel of a model with these weights."""
    model = tiny_convmixer()
    model.load_state_dict(state)
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "args": {"lr": 0.1}},
    lambda s: {"model_state_dict": s, "loss": 0.5},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    lambda s: {"epoch": 3, "arch": "convmixer", "state_dict": s, "state_dict_ema": averaged(s),
               "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{}]},
               "args": argparse.Namespace(lr=0.1)},
    averaged,
    lambda s: {"epoch": 3, **s, "note": None},
    lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
], ids=["plain", "state_dict", "model", "model_state_dict", "module.", "module._orig_mod.",
        "lightning", "compiled-blocks", "timm-saver", "AveragedModel", "flat", "float64"])
def test_reads_other_peoples_checkpoints(tmp_path, wrap):
    theirs = tiny_convmixer()
    randomise(theirs, seed=1)
    wrapped = wrap(theirs.state_dict())
    torch.save(wrapped, tmp_path / "theirs.pth")
    for source in (wrapped, tmp_path / "theirs.pth"):
        assert same_weights(load_weights(tiny_convmixer(), source), theirs.state_dict())


@pytest.mark.parametrize("spoil, message", [
    (lambda s: {"net": s, "epoch": 3}, "missing blocks.0.0.fn.0.bias, .* and 17 more"),
    (lambda s: {**s, "head.bias": None}, "missing head.bias"),
    (lambda s: {**s, 0: torch.ones(1)}, "unexpected 0"),
    (lambda s: {**s, "criterion.weight": torch.ones(1)}, "unexpected criterion.weight"),
    (lambda s: {**s, "module.head.bias": torch.ones(2)}, "of several models"),
    (lambda s: {**s, "0.weight": torch.ones(2), "x.weight": torch.ones(2)}, "unexpected x.weight"),
    (lambda s: {k: v.bool() for k, v in s.items()}, "not of floating-point numbers"),
    (lambda s: {**s, "head.weight": torch.ones(9, 16)},
     r"of another shape head.weight \(9, 16\) for \(2, 16\)")])
def test_what_does_not_fit_is_named_and_changes_nothing(spoil, message):
    model = tiny_convmixer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, spoil(model.state_dict()))
    assert same_weights(model, before)


# timm's are loaded by the tests of each model

@pytest.mark.parametrize("name", ["vit_cnn", "vit_linear"])
@pytest.mark.parametrize("old", [False, True])
def test_a_vit_of_torchvision_loads(name, old):
    """Also by the names that its MLP once had."""
    models = pytest.importorskip("torchvision", reason="needs torchvision").models
    peer = models.VisionTransformer(image_size=32, patch_size=8, hidden_dim=16, num_layers=2,
                                    num_heads=4, mlp_dim=64, num_classes=5)
    nn.init.normal_(peer.heads.head.weight)  # it starts at 0
    randomise(peer.eval(), seed=1)
    state = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2") if old else
             name: tensor for name, tensor in peer.state_dict().items()}
    model = create_model(name, **VIT, num_classes=5, qkv_bias=True, norm_eps=1e-6)
    x = torch.rand(2, 3, 32, 32)
    assert relative_error(load_weights(model, state).eval()(x), peer(x)) <= 1e-5
    with pytest.warns(UserWarning, match="this model has norm_eps 1e-05"):
        load_weights(create_model(name, **VIT, num_classes=5, qkv_bias=True), state)


def test_batchnorm_without_counters_loads():
    """As old files of torchvision's ResNets."""
    theirs, ours = tiny_convmixer(), tiny_convmixer()
    load_weights(ours, {name: tensor for name, tensor in theirs.state_dict().items()
                        if "num_batches_tracked" not in name})
    assert same_weights(ours, theirs.state_dict())


# positions

@pytest.mark.parametrize("old, new", [(4, 3), (4, 7), (14, 12), (2, 8), (1, 2), (5, 1)])
def test_positions_are_resampled_as_timm_does(timm, old, new):
    positions = torch.randn(1, 1 + old * old, 16)
    for dtype in (torch.float32, torch.bfloat16):
        want = timm.layers.resample_abs_pos_embed(positions.to(dtype), [new, new])
        assert torch.equal(resample_positions(positions.to(dtype), new), want)


def test_a_vit_takes_the_weights_of_another_image_size():
    theirs = create_model("vit_cnn", **VIT)
    ours = create_model("vit_cnn", **{**VIT, "image_size": 48})
    load_weights(ours, theirs.state_dict())
    assert torch.equal(ours.pos_embed, resample_positions(theirs.pos_embed, 6))
    assert ours(torch.rand(1, 3, 48, 48)).shape == (1, 2)
    for positions in (theirs.pos_embed[:, 1:], theirs.pos_embed[0, 0]):  # without a class token
        with pytest.raises(ValueError, match="of another shape pos_embed"):
            load_weights(ours, {**theirs.state_dict(), "pos_embed": positions})


# what names do not tell

@pytest.mark.parametrize("name, own, stated", [
    ("convmixer", {"act": "gelu"}, {"act": "relu"}), ("vit_cnn", {"heads": 4}, {"heads": 2}),
    ("vit_cnn", {"norm_eps": 1e-5}, {"norm_eps": 1e-6})])
def test_a_checkpoint_that_states_other_options_is_refused(name, own, stated):
    options = {key: value for key, value in VIT.items() if name == "vit_cnn" or key != "heads"}
    model = create_model(name, **{**options, **own})
    (key, value), = stated.items()
    with pytest.raises(ValueError, match=f"trained with {key} {value!r}, and this model has"):
        load_weights(model, {"state_dict": model.state_dict(), "description": {"options": stated}})
    for description in ({"options": own}, {"options": {}}, "a tiny model"):
        load_weights(model, {"state_dict": model.state_dict(), "description": description})


def test_a_head_of_another_size_is_left_fresh_when_asked_for():
    theirs, ours = tiny_convmixer(num_classes=5), tiny_convmixer()
    head = {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="of another shape head.bias .*, head.weight"):
        load_weights(ours, theirs.state_dict())
    without = {name: t for name, t in theirs.state_dict().items() if name not in head}
    for state in (theirs.state_dict(), without):
        taken, fresh = match_weights(ours, state, classes=["cat", "dog"])
        assert set(fresh) == head and taken.keys() == ours.state_dict().keys() - head
    with pytest.raises(ValueError, match="missing blocks.0.0.fn.0.bias, .* and 15 more"):
        match_weights(ours, {"head.weight": torch.ones(2, 16)}, classes=["cat", "dog"])

    # of the same size: taken, unless it is known to be of other classes
    stated = {"state_dict": ours.state_dict(), "description": {"classes": ["cat", "dog"]}}
    for source, classes, fresh in ((stated, ["cat", "dog"], set()), (stated, ["dog", "cat"], head),
                                   (ours.state_dict(), ["dog", "cat"], set())):
        assert set(match_weights(ours, source, classes=classes)[1]) == fresh


def test_a_conv_of_patches_loads_as_a_matrix():
    theirs, ours = (create_model(name, image_size=IMAGE_SIZE, **TINY)
                    for name in ("vit_cnn", "vit_linear"))
    load_weights(ours, theirs.state_dict())
    x = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(ours(x), theirs(x))
    other = create_model("vit_cnn", image_size=IMAGE_SIZE, **{**TINY, "patch": 16}).state_dict()
    with pytest.raises(ValueError, match="of another shape patch_embed.proj.weight"):
        load_weights(ours, other)
