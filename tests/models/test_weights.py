import argparse
import collections
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mixer.models import create_model, load_weights
from mixer.models.weights import match_weights, resample_positions
from tests.helpers.networks import IMAGE_SIZE, TINY, randomise, relative_error, tiny_convmixer

CASES = Path(__file__).parents[3] / "shared" / "cases" / "weights"
TIMMS = dict(qkv_bias=True, norm_eps=1e-6)
VIT = dict(image_size=IMAGE_SIZE, patch=8, dim=16, depth=2, heads=4)


class Weights(collections.OrderedDict):
    """A state dict of another type."""


def averaged(state):
    """The state dict of an AveragedModel of a model with these weights."""
    model = tiny_convmixer()
    model.load_state_dict(state)
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def same_weights(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "args": {"lr": 0.1}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    lambda s: {"epoch": 3, "arch": "convmixer", "state_dict": s, "version": 2, "metric": 0.5,
               "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{}]},
               "args": argparse.Namespace(lr=0.1, output=Path("out"))},
    lambda s: {"state_dict": s, "best_acc": np.float64(0.5), "loss": np.arange(3.0)},
    averaged,
    lambda s: {"model_state_dict": s, "loss": 0.5},
    lambda s: {"net": s, "acc": 0.5, "epoch": 3},
    lambda s: {"params": s},
    lambda s: {"model_ema": averaged(s)},
    lambda s: {"state_dict_ema": s, "epoch": 3},
    lambda s: {"checkpoint": {"model": {"state_dict": s}}},
    lambda s: {"model": {"name": "convmixer", "patch": 8}, "weights": s},
    lambda s: {"epoch": 3, **s, "note": None},
    lambda s: collections.OrderedDict((f"net.backbone.{k}", v) for k, v in s.items()),
    lambda s: {"model": {f"module.model.{k}": nn.Parameter(v, False) for k, v in s.items()}},
    lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    lambda s: {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v
               for k, v in s.items()},
    lambda s: {k: v.numpy() for k, v in s.items()},
    lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
], ids=["plain", "state_dict", "model", "module.", "module._orig_mod.", "lightning", "timm-saver",
        "numpy-scalar", "AveragedModel", "model_state_dict", "net", "params", "model_ema",
        "state_dict_ema", "nested", "model-is-a-config", "flat", "net.backbone.", "module.model.",
        "compiled-blocks", "checkpointed-blocks", "numpy", "float64"])
def test_reads_other_peoples_checkpoints(tmp_path, wrap):
    theirs, ours = tiny_convmixer(), tiny_convmixer()
    randomise(theirs, seed=1)
    wrapped = wrap(theirs.state_dict())
    torch.save(wrapped, tmp_path / "theirs.pth")
    for source in (wrapped, tmp_path / "theirs.pth", str(tmp_path / "theirs.pth")):
        ours = tiny_convmixer()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # ours
            load_weights(ours, source)
        assert same_weights(ours, theirs.state_dict())


@pytest.mark.skipif(not CASES.exists(), reason="needs the checkpoints in ../shared/cases/weights")
def test_reads_checkpoints_as_other_programs_wrote_them():
    paths = sorted(CASES.iterdir())
    for path in paths:
        model = create_model("convmixer", dim=32, depth=2, patch=8, kernel_size=5, num_classes=3)
        before = model.head.weight.clone()
        assert not torch.equal(load_weights(model, path).head.weight, before)
    assert len(paths) >= 4


def test_a_state_dict_of_another_type_and_half_precision():
    theirs, ours = tiny_convmixer().bfloat16(), tiny_convmixer()
    load_weights(ours, Weights(theirs.state_dict()))
    assert torch.equal(ours.head.weight, theirs.head.weight.float())


def test_averaged_weights_beside_the_others_are_mentioned():
    plain, ema, ours = (tiny_convmixer() for _ in range(3))
    both = {"state_dict_ema": ema.state_dict(), "state_dict": plain.state_dict()}
    with pytest.warns(UserWarning, match="those under state_dict; others are under state_dict_ema"):
        load_weights(ours, both)
    assert same_weights(ours, plain.state_dict())


def test_weights_of_other_modules_beside_the_model_are_mentioned():
    theirs, ours = tiny_convmixer(), tiny_convmixer()
    lightning = {f"model.{k}": v for k, v in theirs.state_dict().items()}
    lightning["criterion.weight"] = torch.ones(2)
    with pytest.warns(UserWarning, match="under state_dict.model; 1 tensors beside it stay unread"):
        load_weights(ours, {"state_dict": lightning})
    assert same_weights(ours, theirs.state_dict())


@pytest.mark.parametrize("spoil", [
    lambda s, m: m, lambda s, m: None, lambda s, m: 3, lambda s, m: [*s.values()], lambda s, m: {},
    lambda s, m: b"x", lambda s, m: {"model": m}, lambda s, m: {"state_dict": None},
    lambda s, m: dict.fromkeys(s), lambda s, m: {**s, "head.bias": None},
    lambda s, m: dict(enumerate(s.values())), lambda s, m: {**s, 0: torch.ones(1)},
    lambda s, m: {**s, "module.head.bias": torch.ones(2)},
    lambda s, m: {**s, "0.weight": torch.ones(2), "x.weight": torch.ones(2)},
    lambda s, m: {**s, "head.bias": torch.ones(2, dtype=torch.int8)},
    lambda s, m: {**s, "head.bias": torch.ones(2, dtype=torch.complex64)},
    lambda s, m: {**s, "head.bias": torch.ones(2, device="meta")},
    lambda s, m: {**s, "head.bias": torch.ones(2).to_sparse()},
    lambda s, m: {k: v.bool() for k, v in s.items()},
])
def test_odd_sources_are_refused(spoil):
    model = tiny_convmixer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_weights(model, spoil(model.state_dict(), model))
    assert same_weights(model, before)


# timm and torchvision

def peers():
    """{name: (our model, theirs)}: the README says that these weights load."""
    reason = "needs timm and torchvision: pip install timm torchvision"
    timm = pytest.importorskip("timm", reason=reason)
    vision = pytest.importorskip("torchvision", reason=reason).models
    mixers, vits = timm.models.convmixer.ConvMixer, timm.models.vision_transformer
    convmixer = dict(dim=16, depth=2, kernel_size=3, patch_size=8, num_classes=5)
    ours = dict(dim=16, depth=2, kernel_size=3, patch=8)
    vit = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=5)
    tv = dict(image_size=32, patch_size=8, hidden_dim=16, num_layers=2, num_heads=4, mlp_dim=64,
              num_classes=5)
    return {
        "ConvMixer of timm": ("convmixer", ours, mixers(**convmixer)),
        "ConvMixer with ReLU of timm": ("convmixer", {**ours, "act": "relu"},
                                        mixers(**convmixer, act_layer=nn.ReLU)),
        "ViT of timm": ("vit_cnn", {**VIT, **TIMMS}, vits.VisionTransformer(**vit)),
        "ViT of timm, linear": ("vit_linear", {**VIT, **TIMMS}, vits.VisionTransformer(**vit)),
        "ViT of torchvision": ("vit_cnn", {**VIT, **TIMMS}, vision.VisionTransformer(**tv)),
        "ViT of torchvision, linear": ("vit_linear", {**VIT, **TIMMS},
                                       vision.VisionTransformer(**tv)),
        "ResNet-18 of torchvision": ("resnet18", {}, vision.resnet18(num_classes=5)),
        "ResNet-18 of timm": ("resnet18", {}, timm.create_model("resnet18", num_classes=5)),
        "EfficientNetV2-B0 of timm": (
            "efficientnetv2_b0", {}, timm.create_model("tf_efficientnetv2_b0", num_classes=5))}


@pytest.mark.parametrize("name", [
    "ConvMixer of timm", "ConvMixer with ReLU of timm", "ViT of timm", "ViT of timm, linear",
    "ViT of torchvision", "ViT of torchvision, linear", "ResNet-18 of torchvision",
    "ResNet-18 of timm", "EfficientNetV2-B0 of timm"])
def test_the_weights_of_timm_and_torchvision_load(tmp_path, name):
    arch, options, peer = peers()[name]
    torch.manual_seed(0)
    if hasattr(peer, "heads"):  # torchvision's starts at 0
        nn.init.normal_(peer.heads.head.weight)
    randomise(peer.eval(), seed=1)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    model = create_model(arch, **{"image_size": 32, **options}, num_classes=5)
    load_weights(model, tmp_path / "peer.pth")
    x = torch.rand(2, 3, 32, 32)
    assert relative_error(model.eval()(x), peer(x)) <= 1e-5


@pytest.mark.parametrize("name", ["ViT of timm", "ViT of torchvision"])
def test_a_vit_without_their_options_says_which_it_needs(name):
    _, _, peer = peers()[name]
    with pytest.raises(ValueError, match=r"needs qkv_bias=True and norm_eps=1e-6 \(--qkv-bias"):
        load_weights(create_model("vit_cnn", **VIT, num_classes=5), peer.state_dict())
    model = create_model("vit_cnn", **VIT, num_classes=5, qkv_bias=True)
    with pytest.warns(UserWarning, match="this model has norm_eps 1e-05"):
        load_weights(model, peer.state_dict())


def test_torchvisions_old_names_load():
    """Of the ViT's MLP, and of a ResNet before BatchNorm counted its batches."""
    _, options, peer = peers()["ViT of torchvision"]
    old = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
           for name, tensor in peer.state_dict().items()}
    model = load_weights(create_model("vit_cnn", **options, num_classes=5), old)
    assert torch.equal(model.blocks[1].mlp.fc2.bias, peer.encoder.layers[1].mlp[3].bias)
    theirs, ours = create_model("resnet18"), create_model("resnet18")
    load_weights(ours, {name: tensor for name, tensor in theirs.state_dict().items()
                        if "num_batches_tracked" not in name})
    assert same_weights(ours, theirs.state_dict())


# positions

@pytest.mark.parametrize("old, new", [(4, 3), (4, 7), (14, 12), (2, 8), (1, 2), (5, 1)])
def test_positions_are_resampled_as_timm_does(old, new):
    layers = pytest.importorskip("timm.layers", reason="needs timm: pip install timm")
    positions = torch.randn(1, 1 + old * old, 16)
    for dtype in (torch.float32, torch.bfloat16):
        want = layers.resample_abs_pos_embed(positions.to(dtype), [new, new])
        assert torch.equal(resample_positions(positions.to(dtype), new), want)


@pytest.mark.parametrize("old, new", [(4, 3), (4, 7), (14, 12)])
def test_positions_are_resampled_as_pillow_resizes_a_picture(old, new):
    """The same cubic with antialiasing, from another hand, channel by channel."""
    positions = torch.randn(1, 1 + old * old, 3)
    got = resample_positions(positions, new)
    assert torch.equal(got[:, 0], positions[:, 0])
    for channel in range(3):
        picture = Image.fromarray(positions[0, 1:, channel].reshape(old, old).numpy())
        want = np.asarray(picture.resize((new, new), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[0, 1:, channel].reshape(new, new), want, atol=1e-5)


def test_a_vit_takes_the_weights_of_another_image_size():
    theirs = create_model("vit_cnn", **VIT)
    ours = create_model("vit_cnn", **{**VIT, "image_size": 48})
    with pytest.warns(UserWarning, match="positions resampled from 4x4 to 6x6 patches"):
        load_weights(ours, theirs.state_dict())
    assert torch.equal(ours.pos_embed, resample_positions(theirs.pos_embed, 6))
    assert ours(torch.rand(1, 3, 48, 48)).shape == (1, 2)
    no_square = {**theirs.state_dict(), "pos_embed": torch.rand(1, 16, 16)}
    with pytest.raises(ValueError, match="of another shape.*pos_embed"):
        load_weights(ours, no_square)


# what names do not tell

@pytest.mark.parametrize("name, own, stated", [
    ("convmixer", {"act": "gelu"}, {"act": "relu"}), ("vit_cnn", {"heads": 4}, {"heads": 2}),
    ("vit_cnn", {"norm_eps": 1e-5}, {"norm_eps": 1e-6})])
def test_a_checkpoint_that_states_other_options_is_refused(name, own, stated):
    options = {key: value for key, value in VIT.items() if name == "vit_cnn" or key != "heads"}
    model = create_model(name, **{**options, **own})
    (key, value), = stated.items()
    for field in ({"description": {"options": stated}}, {"identity": stated}):
        with pytest.raises(ValueError, match=f"trained with {key} {value!r}, and this model has"):
            load_weights(model, {"state_dict": model.state_dict(), **field})
    load_weights(model, {"state_dict": model.state_dict(), "description": {"options": own}})
    load_weights(model, {"state_dict": model.state_dict(), "description": {"options": {}}})
    load_weights(model, {"state_dict": model.state_dict(), "description": "a tiny model"})


# the head

def test_a_head_of_another_size_is_left_fresh_when_asked_for():
    theirs, ours = tiny_convmixer(num_classes=5), tiny_convmixer()
    before = ours.head.weight.clone()
    with pytest.raises(ValueError, match="of another shape.*head.weight"):
        load_weights(ours, theirs.state_dict())
    for state in (theirs.state_dict(),
                  {k: v for k, v in theirs.state_dict().items() if "head" not in k}):
        match = match_weights(ours, state, classes=["cat", "dog"])
        assert match.fresh == ["head.weight", "head.bias"]
        assert match.state.keys() == ours.state_dict().keys() - {"head.weight", "head.bias"}
    assert torch.equal(ours.head.weight, before)
    with pytest.raises(ValueError, match="18 missing"):  # of the others none
        match_weights(ours, {"head.weight": torch.ones(2, 16)}, classes=["cat", "dog"])


@pytest.mark.parametrize("classes, fresh", [
    (["cat", "dog"], []), (["dog", "cat"], ["head.weight", "head.bias"])])
def test_a_head_is_taken_for_the_same_classes_in_the_same_order(classes, fresh):
    model = tiny_convmixer()
    ours = {"state_dict": model.state_dict(),
            "description": {"options": {}, "classes": ["cat", "dog"]}}
    assert match_weights(model, ours, classes=classes).fresh == fresh
    assert match_weights(model, model.state_dict(), classes=classes).fresh == []


@pytest.mark.parametrize("source, target", [("vit_cnn", "vit_linear"), ("vit_linear", "vit_cnn")])
def test_one_patch_embedding_loads_into_the_other(source, target):
    theirs, ours = (create_model(name, image_size=IMAGE_SIZE, **TINY) for name in (source, target))
    load_weights(ours, theirs.state_dict())
    x = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("source, target", [("vit_cnn", "vit_linear"), ("vit_linear", "vit_cnn")])
def test_a_patch_embedding_of_another_patch_is_refused(source, target):
    theirs = create_model(source, image_size=IMAGE_SIZE, **{**TINY, "patch": 16}).state_dict()
    with pytest.raises(ValueError, match="of another shape.*patch_embed.proj.weight"):
        load_weights(create_model(target, image_size=IMAGE_SIZE, **TINY), theirs)


def test_weights_that_do_not_fit_are_named():
    model = tiny_convmixer()
    state = model.state_dict()
    state["head.weight"] = torch.zeros(1000, 16)
    state["extra"] = torch.zeros(1)
    del state["head.bias"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as e:
        load_weights(model, state)
    for problem in ("1 missing (head.bias)", "1 unexpected (extra)",
                    "head.weight (1000, 16) for (2, 16)"):
        assert problem in str(e.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
