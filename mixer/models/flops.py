"""Floating-point operations of a model, counted."""
import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# in a training step: backward counts twice, for the inputs and for the weights
TRAINING_PASSES = 3


def forward_flops(model: nn.Module, image_size: int) -> int:
    """Floating-point operations of convs and matrix products for one image.

    Counted on a copy that needs no memory and computes nothing.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()
