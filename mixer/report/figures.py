"""Logs and measurements -> figures. The only file that imports Matplotlib."""
import functools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from ..experiments import BY_NAME, published_curves
from ..runtime.errors import first_line
from ..runtime.files import save_atomically
from .runs import Run, on_published_images

# of a comparison: {name: (x, its label, y, its label)}
FIGURES = {"loss": ("step", "step", "train_loss", "training cross-entropy"),
           "acc": ("step", "step", "train_acc", "training accuracy"),
           "val_acc_seconds": ("seconds", "seconds of training", "val_acc", "validation accuracy"),
           "val_acc_flops": ("flops", "FLOPs of training", "val_acc", "validation accuracy")}


def drawing(draw: Callable) -> Callable:
    """Make a drawing function ignore Matplotlib's settings, so that it draws alike everywhere.

    If it fails, one line says so: no picture is worth a run.
    """
    @functools.wraps(draw)
    def drawn(path: Path, *args) -> None:
        os.environ["MPLBACKEND"] = "agg"  # the one that is set may not be installed
        try:
            from matplotlib import style
            with style.context("default"):
                draw(path, *args)
        except Exception as e:
            print(f"{path.name} is not drawn: {type(e).__name__}: {first_line(e)}", file=sys.stderr)
    return drawn


@drawing
def draw_curves(path: Path, log: list[dict], title: str) -> None:
    """Loss and accuracy of one run over its steps, training and validation, from its log."""
    figure, panels = new_figure(10, 3.8, 2, title=title)
    for panel, metric, label in zip(panels, ("loss", "acc"), ("cross-entropy", "accuracy"),
                                    strict=True):
        for subset, name, style in (("train", "training", "-"), ("val", "validation", "o-")):
            key = f"{subset}_{metric}"
            points = [(entry["step"], entry[key]) for entry in log if entry[key] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, markersize=3, label=name)
        panel.set(xlabel="step", ylabel=label)
        panel.legend()
    save(figure, path)


@drawing
def draw_comparison(out: Path, runs: dict[str, list[Run]]) -> None:
    """The FIGURES in the folder `out`, of what the logs have: one colour per row.

    A right panel shows the original's training curves on the same axes, if our runs are of the
    same classes and image size.
    """
    for name, (x, x_label, y, y_label) in FIGURES.items():
        measured = {row: logged for row, seeds in runs.items()
                    if (logged := [run for run in seeds if run.log[-1][y] is not None])}
        if not measured:
            continue
        original = published_curves() if x == "step" and on_published_images(runs) else {}
        # left: our curves; right: the published ones
        figure, panels = new_figure(12 if original else 9, 5, 2 if original else 1, sharey=True)
        for row, seeds in measured.items():
            _draw_band(panels[0], row, seeds, x, y)
        panels[0].set(xlabel=x_label, ylabel=y_label, title="ours" if original else None,
                      xscale="linear" if x == "step" else "log")
        for row, points in original.items():
            steps, *values = zip(*points, strict=True)  # losses, accuracies
            label = {"label": None} if row in measured else {}
            panels[1].plot(steps, values[y == "train_acc"], **_style(row) | label | {"marker": ""})
            panels[1].set(title="published: RTX 2080, 25,000 images, batch 250", xlabel=x_label)
        # one legend for both
        figure.legend(loc="outside right center", fontsize=8, title_fontsize=8,
                      title="mean of n seeds;\nband: their range")
        save(figure, out / f"{name}.png")


@drawing
def draw_settings(path: Path, settings: dict[str, list[tuple[bool, list[Run]]]]) -> None:
    """Final validation accuracy against the FLOPs of training: a point per setting of a row.

    settings: {row name: [(whether this one was chosen, its runs)]}; the chosen points are filled.
    """
    figure, (panel,) = new_figure(9, 5, 1)
    for name, points in settings.items():
        style = _style(name) | {"linestyle": "none", "markersize": 8}
        for chosen, runs in points:
            ends = [run.log[-1] for run in runs if run.log[-1]["val_acc"] is not None]
            if ends:
                flops, acc = (statistics.fmean(end[key] for end in ends)
                              for key in ("flops", "val_acc"))
                panel.plot(flops, acc, **style | (
                    {} if chosen else {"label": None, "markerfacecolor": "none"}))
    panel.set(xlabel="FLOPs of training", ylabel="validation accuracy", xscale="log")
    figure.legend(loc="outside right center", fontsize=8, title_fontsize=8,
                  title="filled: each row's\nbest setting")
    save(figure, path)


def _draw_band(panel, name, seeds, x, y):
    """The mean of the seeds' logs at the steps of all, and the band from lowest to highest."""
    steps = {}  # {step: the seeds' points}
    for entry in (entry for run in seeds for entry in run.log):
        if entry[y] is not None:
            steps.setdefault(entry["step"], []).append((entry[x], entry[y]))
    shared = [points for _, points in sorted(steps.items()) if len(points) == len(seeds)]
    xs, ys = zip(*(zip(*points, strict=True) for points in shared), strict=True)
    xs, style = list(map(statistics.fmean, xs)), _style(name)
    marker = style["marker"] if len(xs) < 15 else ""  # a line of one point is invisible
    panel.plot(xs, list(map(statistics.fmean, ys)),
               **style | {"marker": marker, "label": f"{style['label']}, n = {len(seeds)}"})
    if len(seeds) > 1:
        panel.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=style["color"],
                           alpha=0.2, linewidth=0)


def _style(name):
    """The line of a row, with a colour and a marker of its own; grey if it is unknown."""
    style = dict(color="0.4", marker="o", label=name, linewidth=1.4, markersize=4)
    if name in BY_NAME:
        i = list(BY_NAME).index(name)
        style |= dict(color=f"C{i}", marker="os^vDP<>X*"[i % 10], label=BY_NAME[name].title,
                      linestyle="--" if i >= 10 else "-")  # there are ten colours
    return style


def new_figure(width: float, height: float, panels: int, rows: int = 1, title: str = "",
               **shared) -> tuple:
    """A figure of width x height inches with `rows` rows of `panels` panels; and these in order."""
    from matplotlib.figure import Figure  # here, because it takes half a second
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(rows, panels, squeeze=False, **shared).flatten()
    for panel in axes:
        panel.grid(alpha=0.3, which="both")
    return figure, axes


def save(figure, path: Path) -> None:
    save_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
