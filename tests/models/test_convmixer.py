import pytest

from mixer.models import load_weights
from mixer.models.convmixer import ACTIVATIONS, ConvMixer
from tests.helpers.networks import authors_convmixer


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_equals_timm(assert_same_network, timm, act):
    peer = timm.models.ConvMixer(dim=48, depth=3, kernel_size=5, patch_size=8, num_classes=4,
                                 act_layer=ACTIVATIONS[act])
    model = ConvMixer(dim=48, depth=3, kernel_size=5, patch=8, num_classes=4, act=act)
    assert_same_network(model, peer, load_weights)


def test_equals_the_authors_sequential(assert_same_network):
    model = ConvMixer(dim=48, depth=3, kernel_size=5, patch=8, num_classes=4)
    assert_same_network(model, authors_convmixer(48, 3, 5, 8, 4), load_weights)
