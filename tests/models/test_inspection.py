"""What is shown of a model is what the model computes."""
import pytest
import torch
from torch.nn import functional as F

from mixer.models import create_model
from mixer.models.inspection import (
    class_attention,
    depthwise_kernels,
    patch_filters,
    position_similarities,
)

VIT = dict(image_size=32, patch=8, dim=16, depth=3, heads=2)


@pytest.mark.parametrize("name", ["vit_linear", "vit_cnn"])
def test_a_filter_is_what_a_patch_is_multiplied_with(name):
    model = create_model(name, **VIT)
    filters = patch_filters(model)
    assert filters.shape == (16, 8, 8, 3)
    x = torch.rand(1, 3, 32, 32)
    want = (filters * x[0, :, 8:16, :8].permute(1, 2, 0)).sum((1, 2, 3))  # second row, first column
    tokens = model.patch_embed(x)[0]
    torch.testing.assert_close(tokens[4] - model.patch_embed.proj.bias, want, rtol=1e-4, atol=1e-5)


def test_convnets_show_their_first_layer_and_depthwise_kernels():
    model = create_model("convmixer", patch=8, dim=16, depth=2, kernel_size=5)
    assert patch_filters(model).shape == (16, 8, 8, 3)
    kernels = depthwise_kernels(model)
    assert [k.shape for k in kernels] == [(16, 5, 5)] * 2
    assert torch.equal(kernels[1], model.blocks[1][0].fn[0].weight[:, 0])
    assert position_similarities(model) is None and class_attention(model, None) is None
    assert patch_filters(create_model("resnet18")).shape == (64, 7, 7, 3)
    assert depthwise_kernels(create_model("resnet18")) == []


def test_positions_are_compared_by_their_cosine():
    model = create_model("vit_cnn", **VIT)
    got = position_similarities(model)
    a, b = model.pos_embed[0, 1 + 4 * 1 + 2], model.pos_embed[0, 1 + 4 * 3 + 0]
    assert got.shape == (4, 4, 4, 4)
    assert got[1, 2, 3, 0].item() == pytest.approx(F.cosine_similarity(a, b, dim=0).item(),
                                                   abs=1e-6)


def test_the_attention_is_that_of_the_forward_pass():
    """With values that are one-hot, attention's output is its weights."""
    torch.manual_seed(0)
    model = create_model("vit_cnn", **VIT).eval()
    x = torch.rand(2, 3, 32, 32)
    maps = class_attention(model, x)
    assert maps.shape == (3, 2, 4, 4)
    inputs = []
    hook = model.blocks[1].attn.register_forward_hook(lambda m, args, y: inputs.append(args[0]))
    model(x)
    hook.remove()
    attention = model.blocks[1].attn
    q, k, _ = attention.qkv(inputs[0]).reshape(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    one_hot = torch.eye(17).expand(2, 2, 17, 17)
    weights = F.scaled_dot_product_attention(q, k, one_hot)[:, :, 0].mean(1)
    torch.testing.assert_close(maps[1], weights[:, 1:].view(2, 4, 4).detach())
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks)
