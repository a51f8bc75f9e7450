"""Vision Transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.

Differences from the paper, taken from the experiment that we reproduce: no bias in qkv; class token
and position embedding start from N(0, 1); no dropout. Names are timm's, so its weights load
unchanged.
"""
import torch
from torch import nn
from torch.nn import functional as F

from .patches import check_patches


class LinearPatchEmbed(nn.Module):
    """Cut the image into P x P patches and project each with one matrix.

    (B, C, H, W) -> (B, N, D), N = (H / P) * (W / P).  Dosovitskiy et al. 2021, eq. 1.
    Raises ValueError when P does not divide H and W.
    """

    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(patch * patch * 3, dim)

    def forward(self, x):
        P = self.patch
        B, C, H, W = x.shape
        check_patches(H, W, P)
        # cut into patches; the pixels of each in the order (row, column, colour)
        x = x.reshape(B, C, H // P, P, W // P, P)                  # (B, C, h, P, w, P)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)   # (B, h*w, P*P*C)
        return self.proj(x)                                        # (B, N, D)


class ConvPatchEmbed(nn.Module):
    """The same linear map, (B, C, H, W) -> (B, N, D), as a convolution with kernel and stride P.

    Raises ValueError when P does not divide H and W: the convolution would ignore the rest.
    """

    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.proj = PatchConv(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x):
        check_patches(*x.shape[2:], self.patch)
        return self.proj(x).flatten(2).transpose(1, 2)             # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D).  Dosovitskiy et al. 2021, eq. 5-8."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)             # each (B, heads, N, D / heads)
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """fc1, GELU, fc2 on every token, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D).  Dosovitskiy et al. 2021, eq. 2-3."""

    def __init__(self, dim, heads, qkv_bias, norm_eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(B, 3, S, S) -> (B, num_classes) logits, S = image_size in pixels, from the class token.

    `patch_embed` is the class that turns pixels into tokens. timm's models have `qkv_bias=True,
    norm_eps=1e-6`. Raises ValueError when heads does not divide dim, when patch does not divide S,
    or for an image that is not S x S.
    """

    def __init__(self, *, image_size=192, patch=24, dim=512, depth=4, heads=8, num_classes=2,
                 qkv_bias=False, norm_eps=1e-5, patch_embed=ConvPatchEmbed):
        super().__init__()
        self.check(image_size=image_size, patch=patch, dim=dim, heads=heads)
        self.image_size = image_size
        self.options_not_in_weights = {"heads": heads, "norm_eps": norm_eps}
        # tokens: one per patch, and the class token; each has a learned position
        self.patch_embed = patch_embed(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, dim))
        # transformer blocks, and classes from the class token
        self.blocks = nn.Sequential(*(
            Block(dim, heads, qkv_bias, norm_eps) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, num_classes)

    @staticmethod
    def check(*, image_size, patch, dim, heads, **_):
        check_patches(image_size, image_size, patch)
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")

    def forward(self, x):
        B, _, H, W = x.shape
        S = self.image_size
        if (H, W) != (S, S):
            raise ValueError(f"this ViT has positions for {S}x{S} images, not {H}x{W}")
        # tokens in, class token out
        x = self.patch_embed(x)                                            # (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)        # (B, 1 + N, D)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.norm(x[:, 0]))                               # (B, num_classes)


# On a CPU, two operations are faster in another form.

class PatchConv(nn.Conv2d):
    """A conv whose stride is its kernel, (B, C, H, W) -> (B, D, h, w); on a CPU one matrix product.

    oneDNN's weight gradient of such a conv takes 85 ms in bf16 with AMX (32 images, P = 24), and
    this one 2.
    """

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        P, (B, C, H, W) = self.kernel_size[0], x.shape
        x = x.reshape(B, C, H // P, P, W // P, P)                  # (B, C, h, P, w, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)                 # (B, h, w, C*P*P)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


# SDPA's backward is slow on a CPU with AVX-512, if there are few tokens. Forward and backward of 32
# images, 8 heads of 64, in ms:
#
#     tokens  dtype  CPU               SDPA  two products
#         65  fp32   AVX-512 (Zen 5)     31            11
#         65  bf16   AVX-512 (Zen 5)     31             4
#        145  fp32   AVX-512 (Zen 5)     44            43
#        145  bf16   AVX-512 (Zen 5)     62            17
#         65  fp32   AVX2 (Zen 3)        16            17
#        145  fp32   AVX2 (Zen 3)        68            73
FEW_TOKENS = 160 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, (B, heads, N, d) each.  Dosovitskiy et al. 2021, eq. 6-7."""
    if q.device.type == "cpu" and q.shape[2] <= FEW_TOKENS and torch.is_grad_enabled():
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)      # (B, heads, N, N)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
