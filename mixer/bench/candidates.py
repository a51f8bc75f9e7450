"""What is measured: our models, their peers, and the ways of one block."""
import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse
from ..models import create_model
from ..models.convmixer import depthwise_unit


def build(arch, options, image_size, device, kernels, compile):
    """A model of ours, on the device, with the kernels of --kernels."""
    model = create_model(arch, image_size=image_size, **options).to(device)
    if kernels != "torch" and arch == "convmixer":
        fuse(model)
    if compile:
        model.compile()
    return model


def build_peer(arch, options, image_size, device, compile):
    """What others offer for a row: torchvision's ResNet-18, timm's of the other architectures, with the same options, 2 classes."""
    if arch == "resnet18":
        from torchvision.models import resnet18
        model = resnet18(num_classes=2)
    elif arch == "efficientnetv2_b0":
        from timm import create_model as timm_model
        model = timm_model("tf_efficientnetv2_b0", num_classes=2)
    elif arch == "convmixer":
        from timm.models.convmixer import ConvMixer
        model = ConvMixer(dim=512, depth=options.get("depth", 4), kernel_size=9, patch_size=options["patch"], num_classes=2)
    else:
        from timm.models.vision_transformer import VisionTransformer
        model = VisionTransformer(img_size=image_size, patch_size=options["patch"], embed_dim=512, depth=4, num_heads=8,
                                  qkv_bias=False, num_classes=2)
    model = model.to(device)
    if compile:
        model.compile()
    return model


def build_timm(name, kernels, device):
    from timm import create_model as timm_model
    model = timm_model(name).to(device)
    if kernels != "torch":
        fuse(model)
    return model


class Block(nn.Module):
    """ConvMixer's depthwise unit and its residual, in plain PyTorch."""

    def __init__(self, C, K):
        super().__init__()
        self.fn = depthwise_unit(C, K)

    def forward(self, x):
        return self.fn(x) + x


def block_ways(C, K, device):
    """{name: (module, memory format)}: one block, with residual, in the ways that a user has."""
    def compiled(**options):
        model = Block(C, K).to(device)
        model.compile(options=options or None)
        return model
    return {
        "eager": (Block(C, K).to(device), torch.contiguous_format),
        "eager NHWC": (Block(C, K).to(device, memory_format=torch.channels_last), torch.channels_last),
        "compile": (compiled(), torch.contiguous_format),
        "compile NCHW": (compiled(layout_optimization=False), torch.contiguous_format),
        "fused": (DepthwiseGELUBN(C, K, residual=True).to(device), torch.contiguous_format),
    }
