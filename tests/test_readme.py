"""No README can rot: commands parse, links lead somewhere, numbers are those of results/."""
import contextlib
import re
import shlex
from collections import Counter

import pytest

import bench
from mixer.experiments import ROWS, published_curves
from mixer.models import create_model
from mixer.models.flops import forward_flops
from mixer.predict.__main__ import read_config as read_predict_config
from mixer.report.tables import number
from mixer.runtime.cli import parse
from mixer.training.config import MODEL_OPTIONS, read_config
from tests.helpers.commands import ROOT, run_python
from tests.helpers.runs import read_json
from tests.helpers.tables import cells

PAGES = [ROOT / "CONTRIBUTING.md", *(
    path for path in sorted(ROOT.glob("**/README.md"))
    if not {".venv", "runs"} & set(path.relative_to(ROOT).parts))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
FRONT = TEXTS["README.md"]
ALL = "\n".join(TEXTS.values())


def code_blocks(text, language):
    """The fenced blocks of a page in one language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [block for name, block in blocks if name == language]


SHELL = [line for block in code_blocks(ALL, "sh") for line in block.splitlines()]
INLINE = re.findall(r"`(python [^`\n]+)`", ALL)
READERS = {"train.py": lambda words: read_config(words, ""),
           "bench.py": lambda words: bench.Config(**parse(bench.Config, words, "")),
           "-m mixer.predict": read_predict_config}
COMMAND = rf"(?:python|torchrun.*?) ({'|'.join(map(re.escape, READERS))})(.*)"
COMMANDS = sorted({(m[1], m[2].split("&&")[0].strip()) for line in SHELL + INLINE
                   if (m := re.search(COMMAND, line))})


def results(path):
    return read_json(ROOT / "results" / path)


def test_the_front_page_is_one_screen():
    lines = FRONT.splitlines()
    assert len(lines) <= 140 and len(FRONT.encode()) <= 9216 and max(map(len, lines)) <= 140
    assert FRONT.count("![") == 1, "one figure"


def test_the_first_block_sets_everything_up():
    first, (second, third), *_ = map(str.splitlines, code_blocks(FRONT, "sh"))
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    assert all(command.startswith(setup) for command in (*first, second))
    assert len(first) == 1 and first[0].endswith("&& python train.py --arch vit_cnn --patch 24")
    assert second.endswith('".[test]" && python -m pytest -q -n 2')
    assert third == "python -m mixer.predict results/cats-and-dogs photo.jpg"


@pytest.mark.parametrize("script, arguments", COMMANDS)
def test_commands_parse(script, arguments):
    with pytest.raises(SystemExit) if "--help" in arguments else contextlib.nullcontext():
        READERS[script](shlex.split(arguments))


def test_every_kind_of_command_is_found():
    count = Counter(script for script, _ in COMMANDS)
    assert count["train.py"] >= 8 and count["bench.py"] >= 3 and count["-m mixer.predict"] >= 5


@pytest.mark.faults
def test_the_campaigns_command_finds_its_tests():
    command = re.search(r"FAULTS=\S+ DOGS_VS_CATS=\S+ (python -m pytest [^`\n]*)", ALL)[1]
    result = run_python(*command.split()[1:], "--collect-only", "-q")
    found = len(re.findall("^tests/", result.stdout, flags=re.M))
    assert found >= 12, result.stdout + result.stderr


@pytest.mark.parametrize("page", TEXTS)
def test_python_examples_run(page):
    for block in code_blocks(TEXTS[page], "python"):
        exec(block, {})


def test_every_file_of_mixer_is_on_its_page():
    listed = re.findall(r"^([\w/]+\.py) ", TEXTS["mixer/README.md"], flags=re.M)
    files = {path.relative_to(ROOT / "mixer").as_posix() for path in ROOT.glob("mixer/**/*.py")}
    inits = {name for name in files if name.endswith("__init__.py")} - {"models/__init__.py"}
    assert set(listed) == files - inits and len(listed) == len(set(listed))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" not in link:
            assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", TEXTS)
def test_files_named_in_backquotes_exist(page):
    for name in re.findall(r"`(tests/[\w/.*]+\.py)`", TEXTS[page]):
        assert list(ROOT.glob(name)), name


def test_blocks_copied_from_results_are_equal_to_them():
    copies = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", ALL, flags=re.S)
    assert len(copies) >= 4
    for path, text in copies:
        text = re.sub(r"^```\w*\n|^```$", "", text.strip(), flags=re.M)
        assert text.strip() == (ROOT / path).read_text().strip(), path


def test_the_front_table_is_that_of_the_results():
    tables = (ROOT / "results/rates/table.md").read_text().split("\n\n")[::3]
    every, best = ([(*re.match(r"(.*), lr (\S+)", line[0]).groups(),
                     dict(zip(head, line, strict=True))) for line in lines]
                   for head, *lines in map(cells, tables))
    tried = Counter(title for title, _, _ in every)
    usual = {title: line for title, rate, line in every if rate == "0.0001"}
    own = {title: [f"{float(rate):.0e}".replace("e-0", "e-"),
                   f"{line['250,000 images'].strip(' *')} ({line['n']})"]
           for title, rate, line in best if tried[title] > 1}
    usual["MLP-Mixer 24"]["minutes"] = "–"  # of another CPU
    table = re.findall(r"^\| (.*?) \| `(--arch .*?)` \| (.*?) \|$", FRONT, flags=re.M)
    assert [title for title, *_ in table] == [row.title for row in ROWS if row.title in usual]
    for title, arguments, row in table:
        config, _ = read_config([*arguments.split(), "--data", "x"], "")
        options = {name: getattr(config, name) for name in MODEL_OPTIONS}
        model = create_model(config.arch, **options)
        assert row.split(" | ") == [
            f"{sum(p.numel() for p in model.parameters()):,}",
            number(forward_flops(model, config.image_size) / 1e9),
            usual[title]["minutes"], "{val acc} ({n})".format(**usual[title]),
            *own.get(title, "––")]


def test_every_other_number_of_the_front_page_is_in_the_results():
    """Of its prose: whatever has a decimal point."""
    run = results("cpu-25k/convmixer-p24/summary.json")
    steps = results("kernels-cpu/kernels.json")["steps"]
    fused = [row["faster"] for row in steps if row["candidate"] == "fused"]
    demo = (ROOT / "results/demo.txt").read_text()
    demo = re.search(r"final val accuracy (\S+) after (\S+) min", demo)
    known = {f"{run['train_acc']:.3f}", f"{run['val_acc']:.3f}", demo[1],
             f"{published_curves()['convmixer-p24'][-1][2]:.3f}",
             f"{min(fused):.2f}", f"{max(fused):.2f}", "3.10",  # 3.10: of Python
             f"{results('cats-and-dogs/evaluation.json')['accuracy']:.3f}",
             f"{results('mixing/no-attention-lr1e-4/vit_cnn-p24/summary.json')['val_acc']:.3f}"}
    prose = re.sub(r"^\| .*? \| `--arch .*$", "", FRONT, flags=re.M)
    prose = re.sub(r"^```.*?^```$", "", prose, flags=re.M | re.S)
    tables = [ROOT / "results" / name for name in ("rates/table.md", "mixing/table.md")]
    study = {acc for path in tables for acc in re.findall(r"\b0\.\d{3}\b", path.read_text())}
    assert known <= set(re.findall(r"\b\d+\.\d+\b", prose)) <= known | study
    assert round(float(demo[2])) == int(re.search(r"\((\d+) minutes?, validation", FRONT)[1])
    inside = re.search(r"published accuracy is inside at (.*? points)",
                       (ROOT / "results/reproduction/table.md").read_text())
    sentences = " ".join(FRONT.split())
    assert re.findall(r"\d+ of \d+ points", sentences) == [inside[1]]
    log = (ROOT / "results/cpu-25k/convmixer-p24/log.csv").read_text().splitlines()[1:]
    best = min(log, key=lambda line: float(line.split(",")[3])).split(",")[0]
    assert f"best validation loss came at step {best} of {run['steps']}" in sentences


def test_numbers_of_single_runs_are_those_of_their_summaries():
    page = TEXTS["results/README.md"]
    rows = re.findall(r"^\| \[.*?\]\((\S+/summary\.json)\) \| (.*?) \|$", page, flags=re.M)
    single = [path for path in ROOT.glob("results/cpu-*/*/summary.json")
              if not (path.parent.parent / "table.md").exists()]
    assert len(rows) == len(single)
    for path, row in rows:
        s = results(path)
        last = f"{s['images_per_s']:.0f}" if "cpu-4k/" in path else f"{s['val_loss']:.3f}"
        accuracies = [f"{s[key]:.3f}" for key in ("train_acc", "val_acc", "best_val_acc")]
        assert row.split(" | ") == [*accuracies, last]


def test_results_name_no_folder_of_the_machine_that_made_them():
    files = [path for path in ROOT.glob("results/**/*") if path.suffix in (".json", ".csv", ".md")]
    assert len(files) > 100
    for path in files:
        assert not re.search(r'[" ,]/\w+/', path.read_text()), path


def test_counts_of_faults_are_those_of_the_campaign():
    rows = re.findall(r"^\| ([^|]+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", ALL, flags=re.M)
    counts = results("faults.json")
    assert len(rows) > 8
    assert rows == [(row["kind"], *(f"{row[name]:,}" for name in ("tried", "survived", "lost")))
                    for row in counts]
