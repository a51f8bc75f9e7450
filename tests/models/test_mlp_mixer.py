import pytest
from torch import nn

from mixer.models.mlp_mixer import MLPMixer

OURS = dict(image_size=64, patch=16, dim=64, depth=3, num_classes=5)


def timm_mixer():
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    return timm.models.mlp_mixer.MlpMixer(img_size=64, patch_size=16, embed_dim=64, num_blocks=3,
                                          num_classes=5)


def test_equals_timm(assert_same_network):
    assert_same_network(MLPMixer(**OURS), timm_mixer(), nn.Module.load_state_dict)
