"""ResNet-18: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

Names and initialisation are torchvision's, so its weights load unchanged. Weights and activations
are in channels_last memory, where 3x3 convolutions train faster.
"""
import torch
from torch import nn
from torch.nn import functional as F

# (channels, stride of the first block): table 1 of the paper, two basic blocks a stage
STAGES = [(64, 1), (128, 2), (256, 2), (512, 2)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, (B, C_in, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x.add_(shortcut))


class ResNet18(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits; H and W at least 32 pixels."""

    def __init__(self, *, image_size=192, num_classes=2):
        super().__init__()
        self.check(image_size=image_size)

        # stem, four stages, head
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        for i, (channels, stride) in enumerate(STAGES, start=1):
            self.add_module(f"layer{i}", nn.Sequential(
                BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)))
            in_channels = channels
        self.fc = nn.Linear(in_channels, num_classes)

        # initial values as torchvision's: He et al. 2015, eq. 14
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def check(*, image_size):
        if image_size < 32:
            raise ValueError("ResNet-18 halves the image five times: image_size must be at least "
                             f"32 pixels, not {image_size}")

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))            # (B, 64, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))       # (B, 512, H / 32, W / 32)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))          # (B, num_classes)
