"""table.md: rows and seeds side by side."""
import re
import runpy
from pathlib import Path

import pytest

from mixer.experiments import published_curves
from mixer.report import comparison
from mixer.report.comparison import accuracy_at, comparison_text, write_comparison
from mixer.report.reproduction import compare_curves
from mixer.report.runs import find_runs
from mixer.report.studies import write_studies
from tests.helpers.finished import ENVIRONMENT, finished_run
from tests.helpers.runs import read_rows
from tests.helpers.tables import RESULTS, cells


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(comparison, "draw_comparison", lambda out, runs: None)


def text_of(out, failed=()):
    runs = find_runs(out)
    return comparison_text(runs, compare_curves(runs), dict(failed))


def lines_of(text, table):
    """(headings, {row: cells}) of the first, second or third table."""
    tables = re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    head, *rows = cells(tables[table])
    return head, {title: rest for title, *rest in rows}


def test_ours_and_the_published_figures_are_apart(tmp_path):
    for seed, acc in enumerate((0.74, 0.75, 0.76)):
        finished_run(tmp_path, "convmixer-p24", seed, val_acc=acc, step_s=0.25)
    finished_run(tmp_path, "vit_cnn-p24", val_acc=0.60)
    text = text_of(tmp_path, {"resnet18": "failed (exit code 1)"})
    _, rows = lines_of(text, 0)
    assert list(rows) == ["ViT 24 CNN", "ConvMixer 24"] and "\nresnet18: failed (exit" in text
    train = f"{published_curves()['convmixer-p24'][4][2]:.3f}"
    acc = {name: f"{points[-1][2]:.3f}" for name, points in published_curves().items()}
    # between the seeds: 4.303 * 0.01 / sqrt(3)
    assert rows["ConvMixer 24"] == [
        "2,114,050", "3", "0.750 ± 0.025", "0.750 ± 0.025", train, acc["convmixer-p24"], "1,000",
        "2.08", "25.0", "11", "900", "2,132"]
    assert rows["ViT 24 CNN"][1:3] == ["1", "0.600 ± 0.043"]  # of the same seeds' variance
    for word in ("RTX 2080", "nvidia-smi", "derived from a run's median images/s", "resident",
                 "seed 0 or 1 or 2", "2,500 validation images", "bfloat16", ENVIRONMENT["device"]):
        assert word in " ".join(text.split())


def test_a_mean_is_of_all_seeds(tmp_path):
    """Within 10 s, only the faster seed was validated."""
    for seed, step_s in enumerate((0.2, 0.04)):
        finished_run(tmp_path, "resnet18", seed, step_s=step_s)
    assert lines_of(text_of(tmp_path), 1)[1]["ResNet-18"][3] == "-"


def test_accuracy_after_equal_images_seconds_and_flops(tmp_path):
    """500 steps each. The slow one takes 100 s; the cheap one 20 s and 500 TFLOP."""
    finished_run(tmp_path, "resnet18", val_acc=0.9, step_s=0.2, step_flops=2e12)
    finished_run(tmp_path, "convmixer-p24", val_acc=0.7, step_s=0.04, step_flops=1e12)
    text = text_of(tmp_path)
    head, rows = lines_of(text, 1)
    assert head == ["row", "n", "125,000 images", "100 s", "10.0 s", "500 TFLOP", "frontier, s",
                    "frontier, FLOPs"]
    assert [cell.split(" ±")[0] for cell in rows["ResNet-18"]] == [
        "1", "0.900", "0.900", "-", "0.360", "yes", "yes"]
    assert [cell.split(" ±")[0] for cell in rows["ConvMixer 24"]] == [
        "1", "0.700", "0.700", "0.280", "0.700", "yes", "yes"]
    starred = {title: [cell.endswith("*") for cell in row[1:5]] for title, row in rows.items()}
    assert starred == {"ResNet-18": [True, True, False, False],
                       "ConvMixer 24": [False, False, True, True]}


def test_the_last_validation_within_a_budget_counts(tmp_path):
    finished_run(tmp_path, "resnet18", val_acc=0.5, step_s=1.0)
    (run,), = find_runs(tmp_path).values()
    assert accuracy_at(run, "seconds", 99 * 1.01) is not None  # 2 % of slack
    assert accuracy_at(run, "seconds", 90) is None
    assert accuracy_at(run, "seconds", 299.9) == pytest.approx(0.3)
    assert accuracy_at(run, "images", 250 * 450) == pytest.approx(0.4)


def test_the_reproduction_is_counted(tmp_path):
    finished_run(tmp_path, "convmixer-p24", shift=0.001)
    finished_run(tmp_path, "resnet18", shift=0.1, steps=200)
    text = write_comparison(tmp_path, {})
    assert ("The published accuracy is inside at 5 of 7 points, the published loss at 5 of 7."
            in text)
    _, rows = lines_of(text, 2)
    assert rows["ConvMixer 24"][0:2] == ["1", "500"]
    assert rows["ConvMixer 24"][4:6] == ["+0.001", "5 of 5"]
    assert rows["ResNet-18"][5] == rows["ResNet-18"][8] == "0 of 2"
    points = read_rows(tmp_path / "reproduction.csv")
    assert len(points) == 7 and points[0]["row"] == "resnet18"
    assert {p["acc_inside"] for p in points if p["row"] == "resnet18"} == {"False"}


@pytest.mark.parametrize("changes", [
    {"classes": tuple(f"breed {i}" for i in range(37)), "images": 7390},
    {"image_size": 288}])
def test_other_images_than_the_published_ones_have_no_published_columns(tmp_path, changes):
    finished_run(tmp_path, "resnet18", **changes)
    text = write_comparison(tmp_path, {})
    head, rows = lines_of(text, 0)
    assert head == ["row", "parameters", "n", "val acc", "best val acc", "train acc", "images/s",
                    "minutes", "s per 25,000 images", "memory MiB"]
    assert rows["ResNet-18"][5:] == ["2,500", "0.83", "10.0", "900"]
    assert rows["ResNet-18"][2].startswith("0.750 ±")
    assert not re.search("published|reproduction|RTX 2080", text, flags=re.I)
    assert not (tmp_path / "reproduction.csv").exists()


def test_a_run_without_validation_stays_in_the_table(tmp_path):
    finished_run(tmp_path, "resnet18", val_acc=None)
    text = write_comparison(tmp_path, {})
    assert lines_of(text, 0)[1]["ResNet-18"][2] == "-" and "equal cost" not in text


def test_a_disturbed_line_costs_no_seconds(tmp_path):
    folder = finished_run(tmp_path, "resnet18", step_s=0.1)
    log = (folder / "log.csv").read_text().splitlines()
    log[-1] = log[-1].replace(",50.0,", ",500.0,")
    (folder / "log.csv").write_text("\n".join(log) + "\n")
    (run,), = find_runs(tmp_path).values()
    assert run.log[-1]["seconds"] == pytest.approx(50)


# side by side
STUDIES = [RESULTS / "study-a", RESULTS / "mlp-mixer", *sorted(RESULTS.glob("study-c-*"))]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/table.md")), ids=lambda p: p.parent.name)
def test_committed_tables_are_those_of_their_runs(path: Path, tmp_path):
    if path.parent.name == "rates":
        text = write_studies(STUDIES, tmp_path)
    elif path.parent.name == "mixing":
        script = runpy.run_path(str(path.with_name("kernel_sizes.py")))
        text = script["as_table"](script["find_settings"]())
    else:
        text = text_of(path.parent)
    assert path.read_text() == text
