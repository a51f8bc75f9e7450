"""ViT, ConvMixer, MLP-Mixer and two conv nets: one training recipe, and what each costs."""
import importlib

__all__ = ["load_model"]


def __getattr__(name):
    """`mixer.load_model`, imported when it is asked for: `import mixer` imports no torch."""
    if name == "load_model":
        return importlib.import_module("mixer.training.checkpoint").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
