"""Imports point one way: scripts -> mixer, kernels; model files import torch alone; timm and torchvision stay in tests."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("mixer/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py", ROOT / "bench.py"])
# a room may import those with a lower number, and its own files in one direction
ROOMS = {"runtime": 0, "experiments": 0, "models": 1, "data": 1, "report": 1, "training": 2, "bench": 3}
KERNELS_ORDER = ["sync", "reference", "depthwise_cpu", "depthwise_triton", "depthwise_launch", "depthwise_op", "module"]


def imported(path):
    """Absolute names of the modules a file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*base, name]) for name in ([node.module] if node.module else [alias.name for alias in node.names]))


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_oracle_and_no_sibling_package(path):
    roots = {name.split(".")[0] for name in imported(path)}
    peers = path == ROOT / "mixer" / "bench" / "candidates.py"  # imported where they are built
    oracles = {"timm", "torchvision"} if not peers else set()
    assert not roots & {*oracles, "tests", "train", "bench"}
    if path.is_relative_to(ROOT / "mixer") and path.parent != ROOT / "mixer" / "bench":
        assert "kernels" not in roots
    if path.is_relative_to(ROOT / "kernels"):
        assert "mixer" not in roots


@pytest.mark.parametrize("name", ["vit", "convmixer", "resnet", "efficientnet"])
def test_a_model_file_imports_torch_alone(name):
    assert {n.split(".")[0] for n in imported(ROOT / "mixer" / "models" / f"{name}.py")} <= {"torch", "math"}


def test_rooms_import_downwards_only():
    for path in ROOT.glob("mixer/**/*.py"):
        room = path.relative_to(ROOT / "mixer").with_suffix("").parts[0]
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("mixer.") else room
            assert other == room or ROOMS[other] < ROOMS[room], f"{path} imports {name}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "experiments"])
def test_the_files_of_a_room_import_in_one_direction(room):
    files = {f"mixer.{room}.{path.stem}": {n for n in imported(path) if n.startswith(f"mixer.{room}.")}
             for path in (ROOT / "mixer" / room).glob("*.py")}
    while files:  # take away those that import none of the rest, until none is left
        free = {file for file, names in files.items() if not names & files.keys()}
        assert free, f"these import each other: {sorted(files)}"
        files = {file: names for file, names in files.items() if file not in free}


def test_kernels_import_downwards_only_and_triton_in_two_files():
    for path in ROOT.glob("kernels/*.py"):
        names = {name.removeprefix("kernels.") for name in imported(path)}
        if path.stem != "__init__":
            assert not names & set(KERNELS_ORDER[KERNELS_ORDER.index(path.stem):]), path
        assert ("triton" in {name.split(".")[0] for name in names}) == (path.stem in ("depthwise_triton", "depthwise_launch")), path


@pytest.mark.parametrize("script", ["train.py", "bench.py"])
def test_a_command_listens_to_signals_before_it_imports_torch(script):
    """And does so where it is a command, not where it is imported."""
    before, after = (ROOT / script).read_text().split('if __name__ == "__main__":\n    signals.listen()')
    assert "import torch" in after
    code = f"{before}\nimport sys; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_prints_nothing_and_touches_no_device():
    code = ("import torch, kernels, mixer.models, mixer.training.trainer, mixer.report.runs\n"
            "assert not torch.cuda.is_initialized()\n"
            "import sys; assert not {'timm', 'torchvision', 'matplotlib'} & set(sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_kernels_work_without_triton():
    code = ("import sys; sys.modules['triton'] = None  # as if it were not installed\n"
            "import torch, kernels\n"
            "kernels.DepthwiseGELUBN(4, 3)(torch.rand(2, 4, 8, 8)).sum().backward()")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
