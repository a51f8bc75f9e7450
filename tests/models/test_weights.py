import pytest
import torch

from mixer.models import create_model, load_weights
from tests.helpers.networks import IMAGE_SIZE, TINY, tiny_convmixer


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "args": {"lr": 0.1}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
], ids=["plain", "state_dict", "model", "module.", "module._orig_mod.", "lightning"])
def test_reads_other_peoples_checkpoints(tmp_path, wrap):
    theirs, ours = tiny_convmixer(), tiny_convmixer()
    torch.save(wrap(theirs.state_dict()), tmp_path / "theirs.pth")
    load_weights(ours, tmp_path / "theirs.pth")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


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
