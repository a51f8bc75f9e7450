"""Figures show something; draw_speed and draw_memory are drawn in tests/test_bench.py."""
from PIL import Image

from mixer.report.figures import draw_comparison, draw_curves

LOG = [{"step": step, "train_loss": 0.7 - step / 1000, "train_acc": 0.5 + step / 1000,
        "val_loss": 0.69, "val_acc": 0.5} for step in (100, 200)]


def test_figures_are_drawn(tmp_path):
    draw_curves(tmp_path / "curves.png", LOG, "a run")
    draw_comparison(tmp_path, {"convmixer-p24": LOG, "resnet18": LOG[:1]})
    for name in ("curves.png", "loss.png", "acc.png"):
        with Image.open(tmp_path / name) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
            assert image.width > 800 and len(colours) > 50  # lines, not an empty page
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "loss.png", "acc.png"}


def test_a_run_without_validation_is_drawn(tmp_path):
    draw_curves(tmp_path / "curves.png",
                [{**row, "val_loss": None, "val_acc": None} for row in LOG], "no validation")
