"""Which patch model, and at what cost: ViT, ConvMixer, ResNet-18 and EfficientNetV2-B0 on Dogs vs. Cats."""
