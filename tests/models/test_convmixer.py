import pytest
import torch
from torch import nn

from mixer.models import create_model, load_weights
from mixer.models.convmixer import ConvMixer, depthwise_unit
from tests.helpers.networks import authors_convmixer


@pytest.mark.parametrize("options, parameters", [
    (dict(dim=1536, depth=20, kernel_size=9, patch=7), 51_625_960),
    (dict(dim=768, depth=32, kernel_size=7, patch=7, act=nn.ReLU), 21_110_248),
    (dict(dim=1024, depth=20, kernel_size=9, patch=14), 24_383_464),
], ids=["1536/20", "768/32", "1024/20"])
def test_imagenet_parameter_counts(options, parameters):
    with torch.device("meta"):
        model = ConvMixer(**options, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU])
def test_equals_timm(assert_same_network, act):
    convmixer = pytest.importorskip("timm.models.convmixer", reason="needs timm: pip install timm")
    peer = convmixer.ConvMixer(dim=48, depth=3, kernel_size=5, patch_size=8, num_classes=4,
                               act_layer=act)
    model = ConvMixer(dim=48, depth=3, kernel_size=5, patch=8, num_classes=4, act=act)
    assert_same_network(model, peer, nn.Module.load_state_dict)


def test_equals_the_authors_sequential(assert_same_network):
    model = ConvMixer(dim=48, depth=3, kernel_size=5, patch=8, num_classes=4)
    assert_same_network(model, authors_convmixer(48, 3, 5, 8, 4), load_weights)


def test_another_depthwise_unit_takes_the_same_weights():
    class Spy(nn.Sequential):
        calls = []

        def __init__(self, dim, kernel_size):
            super().__init__(*depthwise_unit(dim, kernel_size))
            self.calls.append((dim, kernel_size))

    plain = create_model("convmixer", dim=16, depth=2)
    other = ConvMixer(dim=16, depth=2, depthwise=Spy)
    assert Spy.calls == [(16, 9), (16, 9)]
    other.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 48, 48)
    assert torch.equal(plain(x), other(x))


def test_wrong_calls():
    with pytest.raises(ValueError, match="kernel_size 8 is even"):
        ConvMixer(kernel_size=8)
    with pytest.raises(ValueError, match="192x192 image does not divide into 20x20"):
        ConvMixer(patch=20, dim=8)(torch.rand(1, 3, 192, 192))
