"""ConvMixer: Trockman & Kolter, "Patches Are All You Need?", TMLR 2023.

Parameter names are timm's. The depthwise unit is an argument because it makes this model slow:
a fused unit with the same state-dict keys can replace it.
"""
from torch import fx, nn


def depthwise_unit(dim, kernel_size, act=nn.GELU):
    """Depthwise conv with "same" padding, activation, BatchNorm: (B, D, h, w) -> (B, D, h, w)."""
    return nn.Sequential(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2),
                         act(), nn.BatchNorm2d(dim))


@fx.wrap  # to torch.fx one node, since it cannot trace an `if`
def check_patches(x, P):
    H, W = x.shape[2:]
    if H % P or W % P:
        raise ValueError(f"a {H}x{W} image does not divide into {P}x{P} patches")


class Residual(nn.Module):
    """x -> fn(x) + x."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class ConvMixer(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits.  Trockman & Kolter 2023, eq. 1-3 and figure 2.

    `depthwise(dim, kernel_size)` builds the unit that mixes positions; the default is
    `depthwise_unit` with `act`. `act` is the activation (the authors' 768/32 uses nn.ReLU);
    no name or shape of the weights tells it.
    Raises ValueError for an even kernel, or an image whose sides the patch does not divide.
    """

    def __init__(self, *, patch=24, dim=512, depth=4, kernel_size=9, num_classes=2, act=nn.GELU,
                 depthwise=None):
        super().__init__()
        if problems := self.check(kernel_size=kernel_size):
            raise ValueError("; ".join(problems))
        depthwise = depthwise or (lambda dim, kernel_size: depthwise_unit(dim, kernel_size, act))
        self.patch = patch
        self.stem = nn.Sequential(nn.Conv2d(3, dim, patch, patch), act(), nn.BatchNorm2d(dim))
        self.blocks = nn.Sequential(*(
            nn.Sequential(Residual(depthwise(dim, kernel_size)),
                          nn.Conv2d(dim, dim, kernel_size=1), act(), nn.BatchNorm2d(dim))
            for _ in range(depth)))
        self.head = nn.Linear(dim, num_classes)

    @staticmethod
    def check(*, image_size=None, patch=None, dim=None, depth=None, kernel_size=None) -> list[str]:
        """The problems of these options, a sentence each. An option that is None is not checked."""
        problems = []
        if image_size and patch and image_size % patch:
            sides = (s for s in range(2, min(image_size, 1024) + 1) if image_size % s == 0)
            problems.append(f"patch {patch} does not divide a {image_size}x{image_size} image "
                            f"(these do: {', '.join(map(str, sides)) or 'only 1'})")
        if kernel_size and kernel_size % 2 == 0:
            problems.append(f"kernel_size {kernel_size} is even: 'same' padding needs a centre, "
                            "use an odd one")
        return problems

    def forward(self, x):
        check_patches(x, self.patch)
        x = self.stem(x)                  # (B, D, h, w)
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))  # (B, num_classes)
