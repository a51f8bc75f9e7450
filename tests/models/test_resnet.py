import pytest
import torch
from torch import nn

from mixer.models import create_model


@pytest.mark.parametrize("image_size", [64, 75])
def test_equals_torchvision(assert_same_network, image_size):
    models = pytest.importorskip("torchvision.models",
                                 reason="needs torchvision: pip install torchvision")
    assert_same_network(create_model("resnet18", num_classes=10), models.resnet18(num_classes=10),
                        nn.Module.load_state_dict, image_size, torch.channels_last)


def test_initialised_as_torchvision():
    models = pytest.importorskip("torchvision.models",
                                 reason="needs torchvision: pip install torchvision")
    ours = create_model("resnet18").state_dict()
    theirs = models.resnet18(num_classes=2).state_dict()
    for name in ("conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.conv2.weight"):
        # 9,408 draws or more: a std within 1 %
        assert abs(ours[name].std() / theirs[name].std() - 1) < 0.05
