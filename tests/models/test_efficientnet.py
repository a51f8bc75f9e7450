import pytest
import torch

from mixer.models import create_model, load_weights


@pytest.mark.parametrize("image_size", [64, 75])  # 75: odd maps, where "SAME" pads unevenly
def test_equals_timm(assert_same_network, timm, image_size):
    peer = timm.create_model("tf_efficientnetv2_b0", num_classes=3)
    assert_same_network(create_model("efficientnetv2_b0", num_classes=3), peer,
                        load_weights, image_size, torch.channels_last)


def test_initialised_as_timm(timm):
    ours = create_model("efficientnetv2_b0").state_dict()
    theirs = timm.create_model("tf_efficientnetv2_b0", num_classes=2).state_dict()
    for name in ("conv_stem.weight", "blocks.4.0.conv_dw.weight", "blocks.5.7.conv_pwl.weight",
                 "blocks.3.1.se.conv_reduce.weight"):
        # 864 draws or more: a std within 5 %, times three
        assert abs(ours[name].std() / theirs[name].std() - 1) < 0.15, name
    assert ours["blocks.3.1.se.conv_reduce.bias"].eq(0).all()
