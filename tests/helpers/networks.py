"""Networks that several tests need, and how two of them are compared."""
import torch
from torch import nn

from mixer.models import create_model
from mixer.models.convmixer import ConvMixer, Residual, depthwise_unit

IMAGE_SIZE = 32
TINY = dict(patch=8, dim=16, depth=1)  # options of a ViT or a ConvMixer


def tiny_convmixer(**options) -> ConvMixer:
    """The model of all tests that need some model; helpers/commands.py has it as arguments."""
    options = {"image_size": IMAGE_SIZE, "kernel_size": 3, **TINY, **options}
    return create_model("convmixer", **options)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, norms over the whole tensor."""
    return ((got - want).norm() / want.norm()).item()


def randomise(model: nn.Module, seed: int):
    """Move every scale, shift, bias and running statistic off its initial 1 or 0, where it would
    hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def results(model, x, dy, of_x=True):
    """y, the gradients of x, if asked, and of the parameters, and the buffers."""
    leaf = x.clone().requires_grad_(of_x)
    y = model(leaf)
    gradients = torch.autograd.grad(y, [*[leaf] * of_x, *model.parameters()], dy.to(y.dtype))
    return [y.detach(), *gradients, *(b.clone() for b in model.buffers())]


def authors_convmixer(dim, depth, kernel_size, patch, num_classes):
    """The paper's model as one nn.Sequential (figure 3 there), for its numbering."""
    blocks = [nn.Sequential(Residual(depthwise_unit(dim, kernel_size)),
                            nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim))
              for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, dim, patch, patch), nn.GELU(), nn.BatchNorm2d(dim), *blocks,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, num_classes))
