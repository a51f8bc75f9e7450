"""Figures show something; draw_speed and draw_memory are drawn in tests/test_bench.py."""
import pytest
from PIL import Image

from mixer.report import figures
from mixer.report.figures import draw_comparison, draw_costs, draw_curves
from mixer.report.runs import find_runs
from tests.helpers.finished import finished_run

LOG = [{"step": step, "train_loss": 0.7 - step / 1000, "train_acc": 0.5 + step / 1000,
        "val_loss": 0.69, "val_acc": 0.5} for step in (100, 200)]


def is_drawn(path):
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        return image.width > 800 and len(colours) > 50  # lines, not an empty page


def test_figures_are_drawn(tmp_path):
    out = tmp_path / "figures"
    out.mkdir()
    draw_curves(out / "curves.png", LOG, "a run")
    for seed in (0, 1):
        finished_run(tmp_path, "convmixer-p24", seed, shift=0.1 * seed)
    finished_run(tmp_path, "resnet18", steps=100)
    runs = find_runs(tmp_path)
    draw_comparison(out, runs)
    draw_costs(out, runs)
    names = {"curves.png", "loss.png", "acc.png", "val_acc_seconds.png", "val_acc_flops.png"}
    assert {p.name for p in out.iterdir()} == names
    assert all(is_drawn(out / name) for name in names)


def test_rows_that_are_not_among_the_nine_and_other_classes_are_drawn(tmp_path):
    """One panel, without the published curves of two classes."""
    breeds = tuple(f"breed {i}" for i in range(37))
    two, many = tmp_path / "two", tmp_path / "many"
    for out, classes in ((two, ("cat", "dog")), (many, breeds)):
        folder = finished_run(out, "convmixer-p24", classes=classes)
        summary = folder / "summary.json"
        summary.write_text(summary.read_text().replace("convmixer-p24", "convmixer-p8"))
        folder.rename(out / "convmixer-p8")
        draw_comparison(out, find_runs(out))
    widths = [Image.open(out / "loss.png").width for out in (two, many)]
    assert is_drawn(many / "loss.png") and widths[0] > widths[1]


def test_a_run_without_validation_is_drawn(tmp_path):
    draw_curves(tmp_path / "curves.png",
                [{**row, "val_loss": None, "val_acc": None} for row in LOG], "no validation")


def test_live_curves_take_two_percent_of_the_time(tmp_path, monkeypatch):
    now, drawn = [100.0], []

    def draw(path, rows, title):
        drawn.append((now[0], len(rows)))
        now[0] += 0.5
    monkeypatch.setattr(figures, "draw_curves", draw)
    monkeypatch.setattr(figures.time, "perf_counter", lambda: now[0])
    curves, start = figures.LiveCurves(tmp_path / "curves.png", "a run"), now[0]
    for rows in range(1, 2000):
        now[0] += 0.1
        curves.draw([{}] * rows)
        assert 0.5 * len(drawn) <= 0.02 * (now[0] - start) + 0.5, "one drawing ahead at most"
    assert len(drawn) == pytest.approx(0.02 * (now[0] - start) / 0.5, abs=1.5), "nor much less"
    assert drawn[-1][1] > 1500, "the newest rows"
