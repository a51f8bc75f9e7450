from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixer.models import create_model, load_weights, vit
from mixer.models.vit import ConvPatchEmbed, LinearPatchEmbed, ViT


def timm_vit(timm, **options):
    return timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=3,
                                         num_heads=4, num_classes=5, **options)


OURS = dict(image_size=64, patch=16, dim=64, depth=3, heads=4, num_classes=5)
TIMM = dict(qkv_bias=True, norm_eps=1e-6)


@pytest.mark.parametrize("ours, timms", [
    ({**TIMM, "patch_embed": ConvPatchEmbed}, {}), ({**TIMM, "patch_embed": LinearPatchEmbed}, {}),
    ({}, dict(qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-5)))])
def test_equals_timm(assert_same_network, timm, ours, timms):
    """With timm's settings, and with the original's."""
    assert_same_network(ViT(**OURS, **ours), timm_vit(timm, **timms), load_weights)


def test_the_measure_rejects_spoilt_networks(assert_same_network, timm):
    tanh = ViT(**OURS, **TIMM)
    for block in tanh.blocks:
        block.mlp.act = nn.GELU("tanh")
    for spoilt in (tanh, ViT(**OURS, qkv_bias=True, norm_eps=1e-3)):
        with pytest.raises(AssertionError):
            assert_same_network(spoilt, timm_vit(timm), nn.Module.load_state_dict)


@pytest.mark.parametrize("name", ["vit_linear", "vit_cnn"])
def test_the_initial_values(name):
    model = create_model(name, patch=16)
    assert 0.95 < model.pos_embed.std() < 1.05 and 0.85 < model.cls_token.std() < 1.15
    bound = (16 * 16 * 3) ** -0.5  # uniform within 1 / sqrt(fan_in), the same for both
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_as_two_products_is_attention(dtype, monkeypatch):
    """In float32 to some roundings. In bfloat16 the scores are rounded once more than in SDPA: each
    moves by eps / 2 of the largest, and so does the logarithm of a probability."""
    q, k, v = (torch.randn(2, 4, 17, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
               for seed in range(3))
    results = []
    for few in (0, 17):
        monkeypatch.setattr(vit, "FEW_TOKENS", few)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = vit.attention(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    scores = (q.float() @ k.float().transpose(2, 3)).abs().max().item() / 4
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * (1 + scores / 2)
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert not torch.equal(*(result[0] for result in results)), "one of them did not run"


def test_without_a_gradient_attention_is_sdpa(monkeypatch):
    monkeypatch.setattr(vit, "FEW_TOKENS", 17)
    q = torch.randn(2, 4, 17, 16)
    with torch.no_grad():
        assert torch.equal(vit.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
