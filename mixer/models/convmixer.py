"""ConvMixer: Trockman & Kolter, "Patches Are All You Need?", TMLR 2023.

Parameter names are timm's.
"""
from torch import nn

from .patches import check_patches

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


def depthwise_unit(dim, kernel_size, act=nn.GELU):
    """Depthwise conv with "same" padding, activation, BatchNorm: (B, D, h, w) -> (B, D, h, w)."""
    return nn.Sequential(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
                         act(), nn.BatchNorm2d(dim))


class Residual(nn.Module):
    """x -> fn(x) + x."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class ConvMixer(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits.  Trockman & Kolter 2023, eq. 1-3 and figure 2.

    `act` is "gelu" or "relu" (the authors' 768/32); the weights look the same for both, so a
    checkpoint must say which. Raises ValueError for an even kernel, or an image whose sides the
    patch does not divide.
    """

    def __init__(self, *, image_size=192, patch=24, dim=512, depth=4, kernel_size=9, num_classes=2,
                 act="gelu"):
        super().__init__()
        self.check(image_size=image_size, patch=patch, kernel_size=kernel_size, act=act)
        self.patch = patch
        self.options_not_in_weights = {"act": act}
        make_act = ACTIVATIONS[act]
        # patch embedding, eq. 1
        self.stem = nn.Sequential(nn.Conv2d(3, dim, patch, patch), make_act(), nn.BatchNorm2d(dim))
        # layers: a depthwise conv mixes positions, eq. 2; a pointwise one channels, eq. 3
        self.blocks = nn.Sequential(*(
            nn.Sequential(Residual(depthwise_unit(dim, kernel_size, make_act)),
                          nn.Conv2d(dim, dim, kernel_size=1), make_act(), nn.BatchNorm2d(dim))
            for _ in range(depth)))
        # classes, from the mean over positions
        self.head = nn.Linear(dim, num_classes)

    @staticmethod
    def check(*, image_size, patch, kernel_size, act, **_):
        check_patches(image_size, image_size, patch)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even: 'same' padding needs a centre, "
                             "use an odd one")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be {' or '.join(ACTIVATIONS)}, not {act!r}")

    def forward(self, x):
        check_patches(*x.shape[2:], self.patch)
        x = self.stem(x)                  # (B, D, h, w)
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))  # (B, num_classes)
