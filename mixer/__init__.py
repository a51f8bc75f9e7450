"""ViT, ConvMixer, ResNet-18 and EfficientNetV2-B0: one training recipe, and what each costs."""
