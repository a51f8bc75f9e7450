"""What is measured: our models, their peers, and the implementations of one block."""
import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse

from ..models import create_model
from ..models.convmixer import depthwise_unit


def build(arch: str, options: dict[str, int], image_size: int, device: torch.device,
          kernels: str, compile: bool) -> nn.Module:
    """Our model on the device; `kernels` as in --kernels."""
    model = create_model(arch, image_size=image_size, **options).to(device)
    if kernels != "torch" and arch == "convmixer":
        fuse(model)
    if compile:
        model.compile()
    return model


def build_peer(arch: str, options: dict[str, int], image_size: int, device: torch.device,
               compile: bool) -> nn.Module:
    """The same network, with 2 classes, from torchvision (ResNet-18) or timm (the others)."""
    if arch == "resnet18":
        from torchvision.models import resnet18
        model = resnet18(num_classes=2)
    elif arch == "efficientnetv2_b0":
        from timm import create_model as timm_model
        model = timm_model("tf_efficientnetv2_b0", num_classes=2)
    elif arch == "convmixer":
        from timm.models.convmixer import ConvMixer
        model = ConvMixer(dim=512, depth=options.get("depth", 4), kernel_size=9,
                          patch_size=options["patch"], num_classes=2)
    else:
        from timm.models.vision_transformer import VisionTransformer
        model = VisionTransformer(img_size=image_size, patch_size=options["patch"], embed_dim=512,
                                  depth=4, num_heads=8, qkv_bias=False, num_classes=2)
    model = model.to(device)
    if compile:
        model.compile()
    return model


def build_timm(name: str, device: torch.device, kernels: str) -> nn.Module:
    """timm's ConvMixer of that name, with our kernels unless `kernels` is "torch"."""
    from timm import create_model as timm_model
    model = timm_model(name).to(device)
    if kernels != "torch":
        fuse(model)
    return model


class Block(nn.Module):
    """ConvMixer's depthwise unit and its residual, in plain PyTorch."""

    def __init__(self, C: int, K: int):
        super().__init__()
        self.fn = depthwise_unit(C, K)

    def forward(self, x):
        return self.fn(x) + x


def block_candidates(C: int, K: int,
                     device: torch.device) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """{name: (module, memory format)}: one block with residual, C channels, K x K kernel."""
    NCHW, NHWC = torch.contiguous_format, torch.channels_last

    def compiled(**options):
        model = Block(C, K).to(device)
        model.compile(options=options or None)
        return model
    return {
        "eager": (Block(C, K).to(device), NCHW),
        "eager NHWC": (Block(C, K).to(device, memory_format=NHWC), NHWC),
        "compile": (compiled(), NCHW),
        "compile NCHW": (compiled(layout_optimization=False), NCHW),
        "fused": (DepthwiseGELUBN(C, K, residual=True).to(device), NCHW),
    }
