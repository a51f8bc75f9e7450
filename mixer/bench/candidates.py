"""What is measured: our models, their peers, and the implementations of a depthwise unit."""
import contextlib
import pkgutil
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse

from ..experiments import Row
from ..models import model_options
from ..models.convmixer import ACTIVATIONS, Residual, depthwise_unit

# {architecture: (the same network elsewhere, our image size and options -> its options)};
# vit_linear is left out, because it is the same network as vit_cnn
PEERS = {
    "resnet18": ("torchvision.models:resnet18", lambda size: {}),
    "efficientnetv2_b0": ("timm.models:tf_efficientnetv2_b0", lambda size: {}),
    "convmixer": ("timm.models.convmixer:ConvMixer", lambda size, patch, act, **same: {
        **same, "patch_size": patch, "act_layer": ACTIVATIONS[act]}),
    "vit_cnn": ("timm.models:VisionTransformer", lambda size, patch, dim, heads, norm_eps, **same: {
        **same, "img_size": size, "patch_size": patch, "embed_dim": dim, "num_heads": heads,
        "norm_layer": partial(nn.LayerNorm, eps=norm_eps)}),
    "mlp_mixer": ("timm.models.mlp_mixer:MlpMixer", lambda size, patch, dim, depth: {
        "img_size": size, "patch_size": patch, "embed_dim": dim, "num_blocks": depth}),
}


def build(create: Callable[[], nn.Module], device: torch.device, kernels: str = "torch",
          compile: bool = False) -> nn.Module:
    """The model that `create` makes, on the device; `kernels` as in --kernels."""
    model = create().to(device)
    if kernels != "torch":
        with contextlib.suppress(ValueError):  # it has nothing to fuse
            fuse(model)
    if compile:
        model.compile()
    return model


def peer_maker(row: Row, image_size: int) -> Callable[[], nn.Module]:
    """What makes the same network, with 2 classes, from the package in PEERS.

    A process that unpickles it imports that package first, and does not count it as the model's.
    """
    name, translate = PEERS[row.arch]
    options = translate(image_size, **model_options(row.arch, image_size, **row.options))
    return partial(pkgutil.resolve_name(name), num_classes=2, **options)


def unit_candidates(C: int, K: int, device: torch.device) -> dict[str, nn.Module]:
    """{candidate: the depthwise unit with residual, C channels, K x K kernel}."""
    eager, nhwc, compiled = (Residual(depthwise_unit(C, K)).to(device) for _ in range(3))
    compiled.compile()
    return {"eager": eager, "eager NHWC": nhwc.to(memory_format=torch.channels_last),
            "compile": compiled, "fused": DepthwiseGELUBN(C, K, residual=True).to(device)}
