"""Imports go in one direction and do nothing else; long functions have signposts."""
import ast
import os
import re
import runpy

import pytest
import setuptools

from tests.helpers.commands import ROOT, run_python

MODULES = sorted([*ROOT.glob("mixer/**/*.py"), *ROOT.glob("kernels/**/*.py")])
SCRIPTS = [ROOT / "train.py", ROOT / "bench.py"]
PEERS = ROOT / "mixer" / "bench" / "candidates.py"  # imports timm and torchvision to build them
# a room of mixer/ imports rooms with a lower number
ROOMS = {"runtime": 0, "experiments": 0, "models": 1, "data": 1, "report": 2, "training": 3,
         "bench": 4, "predict": 4}
FOLDERS = ["kernels", *(f"mixer/{room}" for room in ROOMS if room != "experiments")]


def imported(path):
    """Absolute names of the modules that a file imports, anywhere in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*base, name]) for name in names)


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_import_mixer_and_mixer_imports_kernels(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"tests", "train", "bench"}
    assert path == PEERS or not roots & {"timm", "torchvision"}
    if path.is_relative_to(ROOT / "kernels"):
        assert "mixer" not in roots
    if path.is_relative_to(ROOT / "mixer") and path.parent.name != "bench":
        assert "kernels" not in roots


@pytest.mark.parametrize("name", sorted(
    {path.stem for path in ROOT.glob("mixer/models/*.py")} - {"__init__", "flops", "weights"}))
def test_a_model_file_imports_torch_alone(name):
    parts = {"mixer.models.patches"} | ({"mixer.models.vit"} if name == "mlp_mixer" else set())
    names = set(imported(ROOT / "mixer" / "models" / f"{name}.py")) - parts
    assert {n.split(".")[0] for n in names} <= {"torch", "math"}


def test_long_functions_have_signposts():
    for path in MODULES + SCRIPTS:
        for node in ast.walk(ast.parse(source := path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = ast.get_source_segment(source, node).split('"""')[-1].splitlines()
                comments = sum(line.lstrip().startswith("#") for line in body)
                assert len(body) < 22 or comments > 1, f"{path}: {node.name}"


def test_rooms_import_downwards_only():
    for path in ROOT.glob("mixer/**/*.py"):
        room = path.relative_to(ROOT / "mixer").with_suffix("").parts[0]
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("mixer.") else room
            assert other == room or ROOMS[other] < ROOMS[room], f"{path} imports {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_of_a_folder_import_in_one_direction(folder):
    prefix = folder.replace("/", ".") + "."
    files = {prefix + path.stem: {n for n in imported(path) if n.startswith(prefix)}
             for path in (ROOT / folder).glob("*.py")}
    while files:  # remove the files that import none of the rest, until none is left
        free = {file for file, names in files.items() if not names & files.keys()}
        assert free, f"these import each other: {sorted(files)}"
        files = {file: names for file, names in files.items() if file not in free}


def test_triton_is_imported_in_two_files():
    files = {path.stem for path in ROOT.glob("kernels/*.py")
             if "triton" in {name.split(".")[0] for name in imported(path)}}
    assert files == {"depthwise_triton", "depthwise_launch"}


def test_importing_prints_nothing_and_touches_no_device():
    result = run_python(
        "-c", "import signal, sys\n"
        "before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], sys.stdout\n"
        "import torch, kernels, mixer.models, mixer.training.trainer, mixer.report.runs\n"
        "import train, bench\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'timm', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "assert before == ([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],"
        " sys.stdout)")
    assert (result.stdout, result.stderr) == ("", "")


def test_importing_mixer_imports_no_torch():
    run_python(
        "-c", "import sys, mixer; assert 'torch' not in sys.modules\n"
        "assert callable(mixer.load_model) and 'torch' in sys.modules\n"
        "assert not hasattr(mixer, 'load_modle')")


def test_kernels_work_without_triton():
    run_python(
        "-c", "import sys; sys.modules['triton'] = None  # as if it were not installed\n"
        "import torch, kernels\n"
        "kernels.DepthwiseGELUBN(4, 3)(torch.rand(2, 4, 8, 8)).sum().backward()")


@pytest.fixture
def options(monkeypatch):
    """What setup.py says."""
    options = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", options.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return options


def test_installing_brings_no_package_called_kernels(options):
    """PyPI has another project of that name; ours is installed as mixer.kernels."""
    assert {name.split(".")[0] for name in options["packages"]} == {"mixer"}
    for folder in FOLDERS:
        name = "mixer.kernels" if folder == "kernels" else folder.replace("/", ".")
        assert name in options["packages"]
    assert options["package_dir"] == {"mixer.kernels": "kernels"}
    assert os.path.isfile(ROOT / options["package_dir"]["mixer.kernels"] / "__init__.py")


def test_the_lowest_versions_are_those_that_setup_allows(options):
    allowed = [*options["install_requires"], *options["extras_require"]["test"]]
    lowest = [line for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines()
              if not line.startswith("#")]
    assert [line.split(";")[0].replace(">=", "==") for line in allowed] == lowest


def test_the_kernels_import_each_other_relatively():
    """So that they work as `kernels` in the checkout and as `mixer.kernels` elsewhere."""
    for path in ROOT.glob("kernels/*.py"):
        assert not re.search(r"^\s*(from|import) kernels", path.read_text(), flags=re.M), path
