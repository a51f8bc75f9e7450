"""Figures show something, the same on every machine."""
from dataclasses import replace

import pytest
from PIL import Image

from mixer.report.figures import _draw_band, draw_comparison, draw_curves, new_figure
from mixer.report.runs import find_runs
from tests.helpers.commands import run_python
from tests.helpers.finished import finished_run

LOG = [{"step": step, "train_loss": 0.7 - step / 1000, "train_acc": 0.5 + step / 1000,
        "val_loss": 0.69, "val_acc": 0.5} for step in (100, 200)]


def is_drawn(path):
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        return image.width > 800 and len(colours) > 50  # lines, not an empty page


def test_figures_are_drawn(tmp_path):
    """Of two seeds, of a row that stops early, and of one that nobody has published."""
    out = tmp_path / "figures"
    out.mkdir()
    draw_curves(out / "curves.png", LOG, "a run")
    draw_curves(out / "no validation.png",
                [{**row, "val_loss": None, "val_acc": None} for row in LOG], "a run")
    for seed in (0, 1):
        finished_run(tmp_path, "convmixer-p24", seed, shift=0.1 * seed)
    finished_run(tmp_path, "resnet18", steps=100)
    runs = find_runs(tmp_path)
    draw_comparison(out, {**runs, "convmixer-p8": runs["resnet18"]})
    names = {"curves.png", "no validation.png", "loss.png", "acc.png", "val_acc_seconds.png",
             "val_acc_flops.png"}
    assert {p.name for p in out.iterdir()} == names
    assert all(is_drawn(out / name) for name in names)


def test_a_band_has_the_steps_that_all_seeds_logged(tmp_path):
    for seed in (0, 1):
        finished_run(tmp_path, "convmixer-p24", seed, steps=600)
    often, rarely = find_runs(tmp_path)["convmixer-p24"]
    figure, (panel,) = new_figure(4, 4, 1)
    _draw_band(panel, "convmixer-p24", [replace(rarely, log=rarely.log[2::3]), often],
               "step", "train_loss")
    assert list(panel.lines[0].get_xdata()) == [300, 600]


def test_other_classes_have_one_panel_and_without_validation_no_figure(tmp_path):
    finished_run(tmp_path, "convmixer-p24", steps=100, val_acc=None,
                 classes=tuple(f"breed {i}" for i in range(37)))
    draw_comparison(tmp_path, find_runs(tmp_path))
    assert {p.name for p in tmp_path.glob("*.png")} == {"loss.png", "acc.png"}
    assert is_drawn(tmp_path / "loss.png") and Image.open(tmp_path / "loss.png").width < 1200


@pytest.mark.faults
def test_the_settings_of_a_machine_change_no_figure(tmp_path):
    """A backend that is not installed, TeX for all texts, another size of lines."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nlines.linewidth: 9\nbackend: module://nowhere\n")
    code, pictures = ("import pathlib, sys; from mixer.report import figures\n"
                      f"figures.draw_curves(pathlib.Path(sys.argv[1]), {LOG}, 'a run')"), []
    for name, changes in (("plain", {}), ("changed", {"MPLBACKEND": "module://nowhere.inline",
                                                      "MATPLOTLIBRC": str(settings)})):
        path = tmp_path / f"{name}.png"
        run_python("-c", code, path, **changes)
        assert path.exists()
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]


def test_a_drawing_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.inline")  # as in a notebook
    draw_curves(tmp_path / "curves.png", [{"step": "none"}], "a run")
    assert capsys.readouterr().err == "curves.png is not drawn: KeyError: 'train_loss'\n"
    assert not list(tmp_path.iterdir())
    draw_curves(tmp_path / "nowhere" / "curves.png", LOG, "a run")
    assert capsys.readouterr().err.startswith("curves.png is not drawn: OSError: cannot write")
