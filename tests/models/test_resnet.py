from functools import partial

import pytest
import torch

from mixer.models import create_model, load_weights


@pytest.mark.parametrize("package", ["torchvision.models", "timm"])
@pytest.mark.parametrize("image_size", [64, 75])
def test_equals_torchvision_and_timm(assert_same_network, package, image_size):
    models = pytest.importorskip(package, reason="needs timm and torchvision")
    peer = (models.resnet18 if package != "timm" else partial(models.create_model, "resnet18"))(
        num_classes=10)
    assert_same_network(create_model("resnet18", num_classes=10), peer, load_weights, image_size,
                        torch.channels_last)


def test_initialised_as_torchvision():
    models = pytest.importorskip("torchvision.models",
                                 reason="needs torchvision: pip install torchvision")
    ours = create_model("resnet18").state_dict()
    theirs = models.resnet18(num_classes=2).state_dict()
    for name in ("conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.conv2.weight"):
        # 9,408 draws or more: a std within 1 %
        assert abs(ours[name].std() / theirs[name].std() - 1) < 0.05
