"""MLP-Mixer: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021.

Parameter names are timm's, initial values PyTorch's.
"""
from torch import nn

from .patches import check_patches
from .vit import MLP, ConvPatchEmbed

EPS = 1e-6  # LayerNorm's, in the authors' code and timm's


class MixerBlock(nn.Module):
    """One MLP across the tokens of each channel, one across the channels of each token.

    (B, N, D) -> (B, N, D).  Tolstikhin et al. 2021, eq. 1: hidden sizes D / 2 and 4 D.
    """

    def __init__(self, tokens, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mlp_tokens = MLP(tokens, dim // 2)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp_channels = MLP(dim, 4 * dim)

    def forward(self, x):
        # across tokens: the same MLP for every channel
        y = self.norm1(x).transpose(1, 2)                # (B, D, N)
        x = x + self.mlp_tokens(y).transpose(1, 2)
        # across channels: the same MLP for every token
        return x + self.mlp_channels(self.norm2(x))


class MLPMixer(nn.Module):
    """(B, 3, S, S) -> (B, num_classes) logits, S = image_size in pixels, from the mean token.

    Raises ValueError when patch does not divide S, or for an image that is not S x S.
    """

    def __init__(self, *, image_size=192, patch=24, dim=512, depth=4, num_classes=2):
        super().__init__()
        self.check(image_size=image_size, patch=patch)
        self.image_size = image_size
        self.stem = ConvPatchEmbed(patch, dim)
        self.blocks = nn.Sequential(*(
            MixerBlock((image_size // patch) ** 2, dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, num_classes)

    @staticmethod
    def check(*, image_size, patch, **_):
        check_patches(image_size, image_size, patch)

    def forward(self, x):
        H, W = x.shape[2:]
        S = self.image_size
        if (H, W) != (S, S):
            raise ValueError(f"this MLP-Mixer mixes the patches of {S}x{S} images, not {H}x{W}")
        x = self.blocks(self.stem(x))                    # (B, N, D)
        return self.head(self.norm(x).mean(1))           # (B, num_classes)
