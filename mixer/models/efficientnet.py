"""EfficientNetV2-B0: Tan & Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021.

The TensorFlow variant, tf_efficientnetv2_b0 in timm: BatchNorm eps 1e-3, "SAME" padding, SiLU.
Names and initialisation are timm's, so its weights load unchanged. Weights and activations are kept
in channels_last memory: this model trains faster there than in NCHW.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def batch_norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: output side = ceil(side / stride).

    An odd pixel of padding goes to the far edge. With an odd kernel and stride 1 the padding is
    symmetric, so only strided convolutions need a separate pad.
    """

    def __init__(self, in_channels, channels, kernel_size, stride, groups=1):
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, channels, kernel_size, stride, padding, 1, groups, bias=False)

    def forward(self, x):
        if self.stride[0] > 1:
            # so that there are ceil(n / s) windows; the smaller half goes before the first pixel
            k, s = self.kernel_size[0], self.stride[0]
            y_pad, x_pad = (max((math.ceil(n / s) - 1) * s + k - n, 0) for n in x.shape[-2:])
            x = F.pad(x, (x_pad // 2, x_pad - x_pad // 2, y_pad // 2, y_pad - y_pad // 2))
        return super().forward(x)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channel means.  Hu et al. 2018, eq. 2-4."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x):
        gate = x.mean((2, 3), keepdim=True)                                # (B, C, 1, 1)
        gate = self.conv_expand(F.silu(self.conv_reduce(gate)))
        return x * gate.sigmoid()


class ConvBlock(nn.Module):
    """conv 3x3, BN, SiLU: (B, C_in, H, W) -> (B, C, H / stride, W / stride); no expansion."""

    def __init__(self, in_channels, channels, stride, expansion):
        super().__init__()
        self.conv = SameConv2d(in_channels, channels, 3, stride)
        self.bn1 = batch_norm(channels)
        self.skip = stride == 1 and in_channels == channels

    def forward(self, x):
        y = F.silu(self.bn1(self.conv(x)))
        return x + y if self.skip else y


class FusedMBConv(nn.Module):
    """3x3 that widens, then 1x1 that projects; shapes as ConvBlock.  Tan & Le 2021, figure 2."""

    def __init__(self, in_channels, channels, stride, expansion):
        super().__init__()
        hidden = in_channels * expansion
        self.conv_exp = SameConv2d(in_channels, hidden, 3, stride)
        self.bn1 = batch_norm(hidden)
        self.conv_pwl = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn2 = batch_norm(channels)
        self.skip = stride == 1 and in_channels == channels

    def forward(self, x):
        y = F.silu(self.bn1(self.conv_exp(x)))
        y = self.bn2(self.conv_pwl(y))
        return x + y if self.skip else y


class MBConv(nn.Module):
    """1x1 that widens, depthwise 3x3, squeeze-excite, 1x1 that projects.  Tan & Le 2021, fig. 2."""

    def __init__(self, in_channels, channels, stride, expansion):
        super().__init__()
        hidden = in_channels * expansion
        self.conv_pw = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = batch_norm(hidden)
        self.conv_dw = SameConv2d(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = batch_norm(hidden)
        self.se = SqueezeExcite(hidden, in_channels // 4)
        self.conv_pwl = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = batch_norm(channels)
        self.skip = stride == 1 and in_channels == channels

    def forward(self, x):
        y = F.silu(self.bn1(self.conv_pw(x)))
        y = F.silu(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + y if self.skip else y


# (block, repeats, stride of the first, expansion, channels); every kernel is 3x3
STAGES = [(ConvBlock, 1, 1, 1, 16), (FusedMBConv, 2, 2, 4, 32), (FusedMBConv, 2, 2, 4, 48),
          (MBConv, 3, 2, 4, 96), (MBConv, 5, 1, 6, 112), (MBConv, 8, 2, 6, 192)]


class EfficientNetV2B0(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits; H and W at least 32 pixels."""

    def __init__(self, *, image_size=192, num_classes=2):
        super().__init__()
        self.check(image_size=image_size)

        # stem, stages, head
        self.conv_stem = SameConv2d(3, 32, 3, stride=2)
        self.bn1 = batch_norm(32)
        self.blocks, in_channels = nn.Sequential(), 32
        for block, repeats, stride, expansion, channels in STAGES:
            self.blocks.append(nn.Sequential(
                block(in_channels, channels, stride, expansion),
                *(block(channels, channels, 1, expansion) for _ in range(repeats - 1))))
            in_channels = channels
        self.conv_head = nn.Conv2d(in_channels, 1280, 1, bias=False)
        self.bn2 = batch_norm(1280)
        self.classifier = nn.Linear(1280, num_classes)

        # initial values as timm's: He normal over the outputs of a group, uniform head
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1] // m.groups
                nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        bound = 1.0 / math.sqrt(num_classes)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def check(*, image_size):
        if image_size < 32:
            raise ValueError("EfficientNetV2-B0 halves the image five times: image_size must be at "
                             f"least 32 pixels, not {image_size}")

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.silu(self.bn1(self.conv_stem(x)))                          # (B, 32, H / 2, W / 2)
        x = self.blocks(x)                                               # (B, 192, H / 32, W / 32)
        x = F.silu(self.bn2(self.conv_head(x)))                          # (B, 1280, H / 32, W / 32)
        # the mean over pixels; pooling gives bn2 a gradient in another layout: 3 % of a CPU step
        x = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)                  # (B, 1280)
        return self.classifier(x)                                        # (B, num_classes)
