"""Vision Transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.

Unlike the paper, and like the experiment that we reproduce: qkv has no bias, class and position
tokens are drawn from N(0, 1), there is no dropout. Names are timm's, so its weights load unchanged.
"""
import torch
from torch import fx, nn
from torch.nn import functional as F


@fx.wrap  # to torch.fx one node, since it cannot trace an `if`
def check_patches(x, P):
    H, W = x.shape[2:]
    if H % P or W % P:
        raise ValueError(f"a {H}x{W} image does not divide into {P}x{P} patches")


@fx.wrap
def check_size(x, S):
    H, W = x.shape[2:]
    if (H, W) != (S, S):
        raise ValueError(f"this ViT has positions for {S}x{S} images, not {H}x{W}")


class LinearPatchEmbed(nn.Module):
    """Cut the image into P x P patches and project each with one matrix.

    (B, C, H, W) -> (B, N, D), N = (H / P) * (W / P).  Dosovitskiy et al. 2021, eq. 1.
    Raises ValueError when P does not divide H and W.
    """

    def __init__(self, patch, dim, in_channels=3):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(patch * patch * in_channels, dim)

    def forward(self, x):
        P = self.patch
        check_patches(x, P)
        B, C, H, W = x.shape
        x = x.reshape(B, C, H // P, P, W // P, P)                  # (B, C, h, P, w, P)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)   # (B, h*w, P*P*C)
        return self.proj(x)                                        # (B, N, D)


class ConvPatchEmbed(nn.Module):
    """The same linear map, (B, C, H, W) -> (B, N, D), as a convolution with kernel and stride P.

    Raises ValueError when P does not divide H and W: the convolution would ignore the rest.
    """

    def __init__(self, patch, dim, in_channels=3):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x):
        check_patches(x, self.patch)
        return embed(x, self.proj)                                 # (B, N, D)


@fx.wrap
def embed(x, proj):
    """A conv whose stride is its kernel, (B, C, H, W) -> (B, N, D). On a CPU, as one product:
    oneDNN's weight gradient of such a conv takes 85 ms in bf16 with AMX (32 images, P = 24), and
    this one 2."""
    if x.device.type != "cpu":
        return proj(x).flatten(2).transpose(1, 2)
    P, (B, C, H, W) = proj.kernel_size[0], x.shape
    x = x.reshape(B, C, H // P, P, W // P, P)                      # (B, C, h, P, w, P)
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)       # (B, h*w, C*P*P)
    return F.linear(x, proj.weight.flatten(1), proj.bias)


# SDPA's backward is slow on a CPU with AVX-512, if there are few tokens. Forward and backward of 32
# images, 8 heads of 64, ms, SDPA | two products: 65 tokens 31 | 11 in fp32, 31 | 4 in bf16; 145
# tokens 44 | 43, 62 | 17 (Zen 5). With AVX2 it is not: 16 | 17, 68 | 73 in fp32 (Zen 3).
FEW_TOKENS = 160 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0


@fx.wrap
def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, (B, heads, N, d) each.  Dosovitskiy et al. 2021, eq. 6-7."""
    if q.device.type == "cpu" and q.shape[2] <= FEW_TOKENS and torch.is_grad_enabled():
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)      # (B, heads, N, N)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
        x = attend(q, k, v)
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

    def __init__(self, dim, heads, mlp_ratio, qkv_bias, norm_eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

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
                 mlp_ratio=4.0, qkv_bias=False, norm_eps=1e-5, patch_embed=ConvPatchEmbed):
        super().__init__()
        if problems := self.check(image_size=image_size, patch=patch, dim=dim, heads=heads):
            raise ValueError("; ".join(problems))
        self.image_size = image_size
        self.patch_embed = patch_embed(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(
            Block(dim, heads, mlp_ratio, qkv_bias, norm_eps) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, num_classes)

    @staticmethod
    def check(*, image_size=None, patch=None, dim=None, depth=None, heads=None) -> list[str]:
        """The problems of these options, a sentence each. An option that is None is not checked."""
        problems = []
        if image_size and patch and image_size % patch:
            sides = (s for s in range(2, min(image_size, 1024) + 1) if image_size % s == 0)
            problems.append(f"patch {patch} does not divide a {image_size}x{image_size} image "
                            f"(these do: {', '.join(map(str, sides)) or 'only 1'})")
        if dim and heads and dim % heads:
            problems.append(f"dim {dim} does not divide into {heads} heads")
        return problems

    def forward(self, x):
        check_size(x, self.image_size)
        B = x.shape[0]
        x = self.patch_embed(x)                                            # (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)        # (B, 1 + N, D)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.norm(x[:, 0]))                               # (B, num_classes)
