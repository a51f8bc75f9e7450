"""Logs and measurements -> figures. Here alone matplotlib is imported."""
import statistics
import time
from pathlib import Path

from ..experiments import BY_NAME, ROWS, published_curves
from ..runtime.files import save_atomically
from .measurements import MemoryMeasurement, ModelMeasurement, ResolutionMeasurement
from .runs import Run, on_published_images
from .tables import PER_IMAGE, by_row, growth, number

DRAWING = 0.02       # of the time of a run may go into its curves.png
FIRST_DRAWING = 0.6  # seconds, with the import of matplotlib
BAND = "mean of n seeds;\nband: their range"


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


class LiveCurves:
    """curves.png of a run that is on. Drawing takes at most DRAWING of the time."""

    def __init__(self, path: Path, title: str):
        self.path, self.title = path, title
        self.next = time.perf_counter() + FIRST_DRAWING / DRAWING

    def draw(self, rows: list[dict]) -> None:
        """Draw rows of log.csv, or leave it if the last time was too short ago."""
        start = time.perf_counter()
        if start >= self.next:
            draw_curves(self.path, rows, self.title)
            end = time.perf_counter()
            self.next = end + (end - start) / DRAWING


def draw_comparison(out: Path, runs: dict[str, list[Run]]) -> None:
    """loss.png and acc.png in the folder `out`: training curves of the rows, over the seeds.

    The left panel is ours, the right one the original, on the same axes, with one colour per row.
    On other classes or another image size than the original's there is one panel.
    """
    published, styles = published_curves(), _run_styles(runs)
    panels = 2 if on_published_images(runs) else 1
    for metric, index, label in (("loss", 1, "training cross-entropy"),
                                 ("acc", 2, "training accuracy")):
        figure, axes = new_figure(12 if panels == 2 else 8, 4.8, panels, share_y=True)
        ours, original = axes if panels == 2 else (axes, None)
        for name, seeds in runs.items():
            _draw_band(ours, seeds, "step", f"train_{metric}", styles[name])
        ours.set(title="ours", xlabel="step", ylabel=label, xlim=(0, None))
        ours.grid(alpha=0.3)
        if original:
            for row in ROWS:
                label = None if row.name in runs else row.title
                line = {**_row_styles()[row.title], "linewidth": 1.4, "marker": "", "label": label}
                points = published[row.name]
                original.plot([point[0] for point in points], [point[index] for point in points],
                              **line)
            original.set(title="published: RTX 2080, 25,000 images, batch 250", xlabel="step")
            original.grid(alpha=0.3)
        figure.legend(loc="outside right center", fontsize=8, title=BAND, title_fontsize=8)
        save_figure(figure, out / f"{metric}.png")


def draw_costs(out: Path, runs: dict[str, list[Run]]) -> None:
    """val_acc_seconds.png and val_acc_flops.png in the folder `out`, of what the logs have."""
    styles = _run_styles(runs)
    for cost, label in (("seconds", "seconds of training"), ("flops", "FLOPs of training")):
        measured = {name: logged for name, seeds in runs.items()
                    if (logged := [run for run in seeds if run.log[-1][cost] is not None
                                   and run.log[-1]["val_acc"] is not None])}
        if not measured:
            continue
        figure, panel = new_figure(9, 5.4, panels=1)
        for name, seeds in measured.items():
            _draw_band(panel, seeds, cost, "val_acc", styles[name])
        panel.set(xlabel=label, ylabel="validation accuracy", xscale="log")
        panel.grid(alpha=0.3, which="both")
        figure.legend(loc="outside right center", fontsize=8, title=BAND, title_fontsize=8)
        save_figure(figure, out / f"val_acc_{cost}.png")


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


def draw_speed(path: Path, models: list[ModelMeasurement], caption: str) -> None:
    """Images/s against parameters, training beside inference; none of `models` has failed."""
    from matplotlib.ticker import LogLocator
    figure, (training, inference) = new_figure(11, 4.8, share_y=True)
    for m in models:
        s, style = m.speed, _row_styles()[m.row]
        for panel, rate, slow_ms, fast_ms in (
                (training, s.training_images_per_s, s.training_p80, s.training_p20),
                (inference, s.inference_images_per_s, s.inference_p80, s.inference_p20)):
            below = rate - 1000 * m.batch_size / slow_ms
            above = 1000 * m.batch_size / fast_ms - rate
            panel.errorbar(m.counts.parameters / 1e6, rate, yerr=[[below], [above]], markersize=8,
                           **style)
    for panel, title in ((training, "training"), (inference, "inference")):
        panel.set(title=title, xlabel="parameters, millions", xlim=(0, None), yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    training.set_ylabel("images/s: median, p20 and p80")
    figure.legend(*training.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    save_figure(figure, path)


def draw_memory(path: Path, measured: list[MemoryMeasurement], caption: str) -> None:
    """Peak memory of training against the batch size, one line per row of the table."""
    figure, panel = new_figure(8, 4.8, panels=1)
    for title, style in _row_styles().items():
        points = [(m.batch_size, m.memory.training_mib) for m in measured if m.row == title]
        if points:
            panel.plot(*zip(*points, strict=True), markersize=5, **style)
    on_cpu = measured[0].memory.allocated_mib is None
    of = "that the process grew by" if on_cpu else "of allocated tensors"
    panel.set(xlabel="batch size", ylabel=f"peak MiB {of}", xlim=(0, None), ylim=(0, None))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    save_figure(figure, path)


def draw_resolution(path: Path, measured: list[ResolutionMeasurement], caption: str) -> None:
    """Time, memory and FLOPs per image against the side, with the exponent in the legend."""
    from matplotlib.ticker import LogLocator
    figure, panels = new_figure(14, 6, panels=3)
    sides = sorted({m.image_size for m in measured})
    for panel, (quantity, (unit, value)) in zip(panels, PER_IMAGE.items(), strict=True):
        for title, sizes in by_row(measured).items():
            points = [(m.image_size, value(m)) for m in sizes if not m.failed]
            if points:
                exponent = number(growth(sizes, value))
                panel.plot(*zip(*points, strict=True), markersize=5,
                           **{**_row_styles()[title], "label": f"{title}: {exponent}"})
        panel.set(title=quantity, xlabel="side, pixels", ylabel=unit, xscale="log", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.minorticks_off()
        panel.set_xticks(sides, sides)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, title="exponent of the side", title_fontsize=8, ncols=2,
                     loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle(caption, fontsize=8)
    save_figure(figure, path)


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


def _row_styles():
    """{row title: line style}: one colour per row of the table, one marker per family."""
    markers = {"resnet18": "o", "efficientnetv2_b0": "s", "vit_linear": "^", "vit_cnn": "v",
               "convmixer": "D"}
    return {row.title: dict(color=f"C{i}", marker=markers[row.arch], label=row.title,
                            linestyle="--" if row.arch == "vit_linear" else "-")
            for i, row in enumerate(ROWS)}


def _run_styles(runs):
    """{row name: line style}; a row that is not one of the nine is grey."""
    styles = _row_styles()
    return {name: styles[BY_NAME[name].title] if name in BY_NAME else
            dict(color="0.4", marker="o", label=name, linestyle="-") for name in runs}
