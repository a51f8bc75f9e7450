"""Imports point one way: scripts -> mixer, kernels; model files import torch alone; timm and torchvision stay in tests."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("mixer/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py"])
# a file may import those above it
ORDER = ["errors", "files", "experiments", "models", "cli", "data.images", "data.augment", "data.demo", "data.packed",
         "checkpoint", "config", "report", "training"]


def imported(path):
    """Absolute names of the modules a file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_oracle_and_no_sibling_package(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"timm", "torchvision", "tests", "train", "bench"}
    if path.is_relative_to(ROOT / "mixer"):
        assert "kernels" not in roots
    if path.is_relative_to(ROOT / "kernels"):
        assert "mixer" not in roots


@pytest.mark.parametrize("name", ["vit", "convmixer", "resnet", "efficientnet"])
def test_a_model_file_imports_torch_alone(name):
    assert {n.split(".")[0] for n in imported(ROOT / "mixer" / "models" / f"{name}.py")} <= {"torch", "math"}


def test_modules_import_downwards_only():
    for path in ROOT.glob("mixer/**/*.py"):
        own = ".".join(path.relative_to(ROOT / "mixer").with_suffix("").parts)
        if own not in ORDER:
            continue
        for name in imported(path):
            other = name.removeprefix("mixer.")
            if name.startswith("mixer.") and other in ORDER:
                assert ORDER.index(other) < ORDER.index(own), f"{own} imports {other}"


def test_importing_prints_nothing_and_touches_no_device():
    code = ("import torch, mixer.models, mixer.training, mixer.report\n"
            "assert not torch.cuda.is_initialized()\n"
            "import sys; assert not {'timm', 'torchvision', 'matplotlib'} & set(sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
