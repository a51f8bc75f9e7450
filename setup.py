from setuptools import find_packages, setup

setup(
    name="vit-convmixer",
    version="0.1.0",
    description="ViT, ConvMixer, MLP-Mixer, ResNet-18 and EfficientNetV2-B0 from scratch, compared "
                "under one recipe, with a fused depthwise kernel",
    license="MIT",
    python_requires=">=3.10",
    # PyPI has another project called kernels, so kernels/ is installed as mixer.kernels.
    packages=[*find_packages(include=["mixer", "mixer.*"]), "mixer.kernels"],
    package_dir={"mixer.kernels": "kernels"},
    package_data={"mixer": ["published_curves.csv"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=10.1",      # Image.has_transparency_data
        "matplotlib>=3.7",   # legends outside the axes
        "tqdm>=4.64",
    ],
    extras_require={
        # timm and torchvision: what our models are compared with
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9",
                 "timm>=1.0.9", "torchvision>=0.26"],
    },
)
