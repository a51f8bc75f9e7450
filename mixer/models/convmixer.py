"""ConvMixer: Trockman & Kolter, "Patches Are All You Need?", TMLR 2023.

Parameter names are timm's. The depthwise unit is an argument, because it is what makes this model slow:
a fused one with the same state-dict keys can take its place.
"""
from torch import nn


def depthwise_unit(dim, kernel_size, act=nn.GELU):
    """Depthwise conv with "same" padding, activation, BatchNorm: (B, D, h, w) -> (B, D, h, w)."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
        act(),
        nn.BatchNorm2d(dim),
    )


class Residual(nn.Module):
    """x -> fn(x) + x."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class ConvMixer(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits.  Trockman & Kolter 2023, eq. 1-3 and figure 2.

    `depthwise(dim, kernel_size)` builds the unit that mixes positions; `act` is the activation everywhere else,
    and there too by default (the authors' 768/32 takes nn.ReLU).
    Raises ValueError for an even kernel, or an image whose sides the patch does not divide.
    """

    def __init__(self, *, patch=24, dim=512, depth=4, kernel_size=9, num_classes=2, act=nn.GELU, depthwise=None):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre")
        depthwise = depthwise or (lambda dim, kernel_size: depthwise_unit(dim, kernel_size, act))
        self.patch = patch
        self.stem = nn.Sequential(nn.Conv2d(3, dim, patch, stride=patch), act(), nn.BatchNorm2d(dim))
        self.blocks = nn.Sequential(*(
            nn.Sequential(
                Residual(depthwise(dim, kernel_size)),
                nn.Conv2d(dim, dim, kernel_size=1),
                act(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        B, C, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"a {H}x{W} image does not divide into {self.patch}x{self.patch} patches")
        x = self.stem(x)                  # (B, D, h, w)
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))  # (B, num_classes)
