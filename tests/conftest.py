"""What all tests share: commands, pictures, and the counts of survived faults."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

# before torch is imported: tiny tensors gain nothing from threads, and tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # train.py, bench.py, mixer and kernels

import pytest
import torch

# before the kernels are imported: without a GPU, Triton's interpreter runs them on the CPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from PIL import Image

from kernels import depthwise_cpu
from kernels import module as kernels_module
from mixer.runtime import cli
from tests.helpers.commands import Command


def pytest_collection_modifyitems(config, items):
    """Mark what starts commands, and leave the campaign to those who ask for it."""
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params or {}
        fixtures = set(item.fixturenames) - set(parameters)
        if fixtures & {"command", "train"} or item.path.parent.name == "faults":
            item.add_marker(pytest.mark.faults)
    if "campaign" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]


@pytest.fixture(autouse=True)
def small_maps_are_fused():
    """On the maps of these tests the parts are faster, and the fused unit would never run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise_cpu, "fusing_pays", lambda *args: True)
        patch.setattr(kernels_module, "FEWEST_OUTPUTS", 0)
        yield patch


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Forty noisy pictures in Kaggle's flat layout, cats bright above and dogs below."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        pixels[slice(0, 16) if i % 2 else slice(16, 32)] += 100
        Image.fromarray(pixels).save(root / f"{'cat' if i % 2 else 'dog'}.{i}.png")
    return root


@pytest.fixture
def out(tmp_path):
    """Where a test's run goes."""
    return tmp_path / "run"


@pytest.fixture
def command(tmp_path):
    """command(script, *arguments, ...) -> a Command with a cache of its own test. At the end of the
    test, what still runs is killed, and each planted fault must have happened."""
    started = []

    def start(script, *arguments, env=None, **options):
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **(env or {})}
        started.append(Command(script, arguments, tmp_path / "streams", env, **options))
        return started[-1]
    yield start
    for process in started:
        if process.code() is None:
            process.send(9)
    for process in started:
        process.wait()


@pytest.fixture
def call(tmp_path, capsys, small_maps_are_fused):
    """call(main, *arguments) -> CompletedProcess of a command that runs in this process."""
    def run(main, *arguments):
        small_maps_are_fused.undo()  # bit for bit as in a process of its own
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            patch.setattr(sys, "stdout", sys.stdout)  # comes back from a rank that prints nothing
            warnings.simplefilter("error", UserWarning)  # pytest would keep it from stderr
            with pytest.raises(SystemExit) as e:
                cli.run(main, list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, e.value.code, *capsys.readouterr())
    return run


@pytest.fixture
def train(command, call):
    """train(*arguments) -> the finished command; train.start(*arguments) -> a running process. With
    options of Command, it runs in a process of its own; without, in this one."""
    def run(*arguments, **options):
        if options:
            return command("train.py", *arguments, **options).wait()
        from train import main
        return call(main, *arguments)
    run.start = lambda *arguments, **options: command("train.py", *arguments, **options)
    return run


# the counts of faults

COUNTS = []  # [kind, tried, survived, lost]; with pytest-xdist, those of all workers


@pytest.fixture
def tally(record_property):
    """tally(kind, tried, survived): counts for the end of the test run; the rest is lost."""
    def count(kind, tried, survived):
        record_property("fault", [kind, tried, survived, tried - survived])
        assert survived == tried, f"{tried - survived} of {tried} lost: {kind}"
    return count


def pytest_runtest_logreport(report):
    if report.when == "call":
        COUNTS.extend(value for name, value in report.user_properties if name == "fault")


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        total = [sum(numbers) for numbers in zip(*(count[1:] for count in COUNTS), strict=True)]
        terminalreporter.section("faults: tried, survived, lost")
        for kind, tried, survived, lost in [*sorted(COUNTS), ["all", *total]]:
            terminalreporter.write_line(f"{tried:>7,} {survived:>7,} {lost:>5,}  {kind}")
        if path := os.environ.get("FAULTS"):
            save_counts(Path(path))


def save_counts(path):
    """Into a json file, which keeps the rows of those kinds that were not tried now."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = {row["kind"]: row for row in rows}
    for count in COUNTS:
        rows[count[0]] = dict(zip(("kind", "tried", "survived", "lost"), count, strict=True))
    rows = sorted(rows.values(), key=lambda row: row["kind"])
    path.write_text(json.dumps(rows, indent=1) + "\n")
