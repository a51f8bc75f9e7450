"""The README cannot rot: its commands parse, its files exist, its numbers are those of results/."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from mixer.runtime.cli import parse, invalid_values
from mixer.training.config import MODEL_OPTIONS, read_config
from mixer.models import create_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines() if line and line[0] != "#"]
BENCH = [match[0] for match in re.finditer(r"python bench\.py[^`|&#\n]*", README)]
TRAIN = ["python " + match[1] for match in re.finditer(r"(?:python|torchrun.*) (train\.py[^`|&#\n]*)", README)]


def test_the_first_two_commands_set_everything_up():
    first, second = COMMANDS[:2]
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ")
    assert first.endswith("&& python train.py --arch vit_cnn --patch 24") and second.endswith("&& python -m pytest -q -n 2")
    assert '".[test]"' in second


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_parse(command):
    arguments = shlex.split(command)[2:]
    if arguments == ["--help"]:
        with pytest.raises(SystemExit):
            read_config(arguments, "")
    else:
        read_config(arguments, "")


@pytest.mark.parametrize("command", BENCH)
def test_bench_commands_parse(command):
    given, wrong = parse(bench.Config, shlex.split(command)[2:], "")
    assert not wrong + invalid_values(bench.Config(**given))


def test_the_campaigns_command_finds_its_tests():
    command = re.search(r"`FAULTS=\S+ DOGS_VS_CATS=\S+ (python -m pytest .*?)`", README)[1]
    result = subprocess.run([sys.executable, *command.split()[1:], "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and len(re.findall("^tests/", result.stdout, flags=re.M)) >= 12, result.stdout + result.stderr


def test_python_examples_run():
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    for block in examples:
        exec(block, {})


def test_files_named_in_the_tour_exist():
    tour = next(block for language, block in BLOCKS if "train.py" in block and not language and "mixer/" in block)
    names = [line.split()[0] for line in tour.splitlines()]
    for name in names:
        assert (ROOT / name).exists(), name
    modules = {p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("mixer/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "bench.py"] if p.name != "__init__.py"}
    assert not modules - {name for name in names}, "files missing from the tour"


def test_blocks_copied_from_results_are_equal_to_them():
    copies = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", README, flags=re.S)
    assert copies
    for path, text in copies:
        text = re.sub(r"^```\w*\n|^```$", "", text.strip(), flags=re.M)
        assert text.strip() == (ROOT / path).read_text().strip(), path


def test_links_into_the_repository_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_numbers_of_single_runs_are_those_of_their_summaries():
    rows = re.findall(r"^\| \[.*?\]\((results/\S+/summary\.json)\) \| (.*?) \|$", README, flags=re.M)
    assert rows
    for path, cells in rows:
        s = json.loads((ROOT / path).read_text())
        assert cells.split(" | ") == [f"{s['train_acc']:.3f}", f"{s['val_acc']:.3f}", f"{s['best_val_acc']:.3f}",
                                      f"{s['images_per_s']:.0f}"], path


def test_counts_of_faults_are_those_of_the_campaign():
    rows = re.findall(r"^\| ([^|]+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", README, flags=re.M)
    counts = json.loads((ROOT / "results" / "faults.json").read_text())
    assert rows == [(row["kind"], *(f"{row[name]:,}" for name in ("tried", "survived", "lost"))) for row in counts] and len(rows) > 8


def test_parameter_counts_in_the_readme():
    rows = re.findall(r"^\| .*? \| `(--arch .*?)` \| ([\d,]+) \|$", README, flags=re.M)
    assert len(rows) == 9
    for arguments, count in rows:
        config = read_config([*arguments.split(), "--data", "x"], "")
        model = create_model(config.arch, **{name: getattr(config, name) for name in MODEL_OPTIONS})
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count
