"""Logs and measurements -> figures. Here alone matplotlib is imported."""
import functools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from ..experiments import BY_NAME, ROWS, published_curves
from ..runtime.errors import first_line
from ..runtime.files import save_atomically
from .runs import Run, on_published_images

MARKERS = {"resnet18": "o", "efficientnetv2_b0": "s", "vit_linear": "^", "vit_cnn": "v",
           "convmixer": "D"}


def drawing(draw: Callable) -> Callable:
    """A function of a path that draws the same on every machine, whatever Matplotlib's settings.

    It returns whether it has drawn. If it fails, one line says so: a picture is not worth a run.
    """
    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> bool:
        os.environ["MPLBACKEND"] = "agg"  # the one that is set may not be installed
        try:
            from matplotlib import style
            with style.context("default"):
                draw(*args, **kwargs)
            return True
        except Exception as e:
            print(f"{Path(args[0]).name} is not drawn: {type(e).__name__}: {first_line(e)}",
                  file=sys.stderr)
            return False
    return drawn


@drawing
def draw_curves(path: Path, rows: list[dict], title: str) -> None:
    """Loss and accuracy of one run over its steps, training and validation; rows of log.csv."""
    figure, panels = new_figure(10, 3.8)
    for panel, metric, label in zip(panels, ("loss", "acc"), ("cross-entropy", "accuracy"),
                                    strict=True):
        for subset, name, style in (("train", "training", "-"), ("val", "validation", "o-")):
            key = f"{subset}_{metric}"
            points = [(row["step"], row[key]) for row in rows if row[key] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, markersize=3, label=name)
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    save_figure(figure, path)


@drawing
def draw_comparison(out: Path, runs: dict[str, list[Run]]) -> None:
    """loss.png and acc.png in the folder `out`: training curves of the rows, over the seeds.

    The left panel is ours, the right one the original, on the same axes, with one colour per row.
    On other classes or another image size than the original's there is one panel.
    """
    published, panels = published_curves(), 2 if on_published_images(runs) else 1
    for metric, index, label in (("loss", 1, "training cross-entropy"),
                                 ("acc", 2, "training accuracy")):
        figure, axes = new_figure(12 if panels == 2 else 8, 4.8, panels, share_y=True)
        ours, *original = axes if panels == 2 else (axes,)
        for name, seeds in runs.items():
            _draw_band(ours, seeds, "step", f"train_{metric}", _style(name))
        ours.set(title="ours", xlabel="step", ylabel=label, xlim=(0, None))
        ours.grid(alpha=0.3)
        for panel in original:
            for row in ROWS:
                points = published[row.name]
                panel.plot([point[0] for point in points], [point[index] for point in points],
                           **_style(row.name) | {
                               "linewidth": 1.4, "marker": "",
                               "label": None if row.name in runs else row.title})
            panel.set(title="published: RTX 2080, 25,000 images, batch 250", xlabel="step")
            panel.grid(alpha=0.3)
        _save_with_legend(figure, out / f"{metric}.png")


@drawing
def draw_costs(out: Path, runs: dict[str, list[Run]]) -> None:
    """val_acc_seconds.png and val_acc_flops.png in the folder `out`, of what the logs have."""
    for cost, label in (("seconds", "seconds of training"), ("flops", "FLOPs of training")):
        measured = {name: logged for name, seeds in runs.items()
                    if (logged := [run for run in seeds if run.log[-1][cost] is not None
                                   and run.log[-1]["val_acc"] is not None])}
        if measured:
            figure, panel = new_figure(9, 5.4, panels=1)
            for name, seeds in measured.items():
                _draw_band(panel, seeds, cost, "val_acc", _style(name))
            panel.set(xlabel=label, ylabel="validation accuracy", xscale="log")
            panel.grid(alpha=0.3, which="both")
            _save_with_legend(figure, out / f"val_acc_{cost}.png")


def _draw_band(panel, seeds, x, y, style):
    """The mean of the seeds' logs at each step, and the band from their lowest to highest."""
    steps = {}  # {step: the seeds' rows}
    for run in seeds:
        for row in run.log:
            if row[x] is not None and row[y] is not None:
                steps.setdefault(row["step"], []).append(row)
    xs = [statistics.fmean(row[x] for row in rows) for rows in steps.values()]
    ys = [[row[y] for row in rows] for rows in steps.values()]
    marker = style["marker"] if len(xs) < 15 else ""  # a line of one point is invisible
    panel.plot(xs, [statistics.fmean(values) for values in ys],
               **{**style, "marker": marker, "markersize": 4, "linewidth": 1.4,
                  "label": f"{style['label']}, n = {len(seeds)}"})
    if len(seeds) > 1:
        panel.fill_between(xs, [min(values) for values in ys], [max(values) for values in ys],
                           color=style["color"], alpha=0.2, linewidth=0)


def new_figure(width, height, panels=2, share_y=False, rows=1):
    """A figure of so many inches with panels side by side, in rows, and the panels."""
    # imported here, because it takes half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels, sharey=share_y)


def save_figure(figure, path):
    save_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _save_with_legend(figure, path):
    figure.legend(loc="outside right center", fontsize=8, title_fontsize=8,
                  title="mean of n seeds;\nband: their range")
    save_figure(figure, path)


def _style(name):
    """The line of a row: a colour of its own, the marker of its family; grey if it is unknown."""
    if name not in BY_NAME:
        return dict(color="0.4", marker="o", label=name, linestyle="-")
    row = BY_NAME[name]
    return dict(color=f"C{list(BY_NAME).index(name)}", marker=MARKERS.get(row.arch, "o"),
                label=row.title, linestyle="--" if row.arch == "vit_linear" else "-")
