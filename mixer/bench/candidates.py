"""What is measured: our models, their peers, and the implementations of one block."""
import torch
from torch import nn

from kernels import DepthwiseGELUBN, fuse

from ..experiments import Row
from ..models import create_model
from ..models.convmixer import depthwise_unit

# {architecture: the package that has the same network}; vit_linear is the same network as vit_cnn
PEERS = {"resnet18": "torchvision", "efficientnetv2_b0": "timm", "convmixer": "timm",
         "vit_cnn": "timm"}


def build(row: Row, image_size: int, device: torch.device, kernels: str,
          compile: bool) -> nn.Module:
    """Our model on the device; `kernels` as in --kernels."""
    model = create_model(row.arch, image_size=image_size, **row.options)
    return finished(model, device, compile, kernels if row.arch == "convmixer" else "torch")


def build_peer(row: Row, image_size: int, device: torch.device, compile: bool) -> nn.Module:
    """The same network, with 2 classes, from the package in PEERS."""
    if row.arch == "resnet18":
        from torchvision.models import resnet18
        model = resnet18(num_classes=2)
    elif row.arch == "efficientnetv2_b0":
        from timm import create_model as timm_model
        model = timm_model("tf_efficientnetv2_b0", num_classes=2)
    elif row.arch == "convmixer":
        from timm.models.convmixer import ConvMixer
        model = ConvMixer(dim=512, depth=row.options.get("depth", 4), kernel_size=9,
                          patch_size=row.options["patch"], num_classes=2)
    elif row.arch == "vit_cnn":
        from timm.models.vision_transformer import VisionTransformer
        model = VisionTransformer(img_size=image_size, patch_size=row.options["patch"],
                                  embed_dim=512, depth=4, num_heads=8, qkv_bias=False,
                                  num_classes=2)
    return finished(model, device, compile)


def build_timm(name: str, image_size: int, device: torch.device, kernels: str,
               compile: bool) -> nn.Module:
    """timm's ConvMixer of that name, as `build` makes ours."""
    from timm import create_model as timm_model
    return finished(timm_model(name), device, compile, kernels)


def finished(model: nn.Module, device: torch.device, compile: bool,
             kernels: str = "torch") -> nn.Module:
    model.to(device)
    if kernels != "torch":
        fuse(model)
    if compile:
        model.compile()
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
