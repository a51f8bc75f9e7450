"""Fused kernels: ConvMixer's depthwise conv + GELU + BatchNorm as one operation."""
from .depthwise_op import depthwise_gelu_bn, why_not_triton
from .module import DepthwiseGELUBN, fuse, unfuse

__all__ = ["DepthwiseGELUBN", "depthwise_gelu_bn", "fuse", "unfuse", "why_not_triton"]
