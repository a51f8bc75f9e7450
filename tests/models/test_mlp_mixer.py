from torch import nn

from mixer.models.mlp_mixer import MLPMixer


def test_equals_timm(assert_same_network, timm):
    peer = timm.models.MlpMixer(img_size=64, patch_size=16, embed_dim=64, num_blocks=3,
                                num_classes=5)
    model = MLPMixer(image_size=64, patch=16, dim=64, depth=3, num_classes=5)
    assert_same_network(model, peer, nn.Module.load_state_dict)
