import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixer.models import create_model
from mixer.models.efficientnet import SameConv2d


@pytest.mark.parametrize("image_size", [64, 75])  # 75: odd maps, where "SAME" pads unevenly
def test_equals_timm(assert_same_network, image_size):
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    peer = timm.create_model("tf_efficientnetv2_b0", num_classes=3)
    assert_same_network(create_model("efficientnetv2_b0", num_classes=3), peer,
                        nn.Module.load_state_dict, image_size, torch.channels_last)


def test_initialised_as_timm():
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    ours = create_model("efficientnetv2_b0").state_dict()
    theirs = timm.create_model("tf_efficientnetv2_b0", num_classes=2).state_dict()
    for name in ("conv_stem.weight", "blocks.4.0.conv_dw.weight", "blocks.5.7.conv_pwl.weight",
                 "blocks.3.1.se.conv_reduce.weight"):
        # 864 draws or more: a std within 5 %, times three
        assert abs(ours[name].std() / theirs[name].std() - 1) < 0.15, name
    assert ours["blocks.3.1.se.conv_reduce.bias"].eq(0).all()


@pytest.mark.parametrize("side, stride, expected", [(8, 1, 8), (8, 2, 4), (9, 2, 5), (7, 2, 4)])
def test_same_padding_puts_the_odd_pixel_at_the_far_edge(side, stride, expected):
    conv = SameConv2d(1, 1, 3, stride)
    x = torch.rand(1, 1, side, side)
    out = conv(x)
    assert out.shape[-2:] == (expected, expected)
    near = 1 if stride == 1 or side % 2 else 0
    corner = F.conv2d(F.pad(x, (near, 2, near, 2)), conv.weight)[0, 0, 0, 0]
    torch.testing.assert_close(out[0, 0, 0, 0], corner)
