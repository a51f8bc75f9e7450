"""Logs and measurements -> figures; the only place that imports matplotlib."""
from pathlib import Path

from ..experiments import ROWS, published_curves
from ..runtime.files import save_atomically
from .measurements import MemoryMeasurement, ModelMeasurement


def draw_curves(path: Path, rows: list[dict], title: str) -> None:
    """Loss and accuracy of one run over its steps, training and validation; rows of log.csv."""
    figure, panels = _figure(10, 3.8)
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
    _save_figure(figure, path)


def draw_comparison(out: Path, logs: dict[str, list[dict]]) -> None:
    """loss.png and acc.png in the folder `out`: training curves of the table's rows.

    logs: {row name: rows of log.csv}. The left panel is this run, the right one the original, on
    the same axes, with one colour per row of the table.
    """
    published, styles = published_curves(), _row_styles()
    for metric, index, label in (("loss", 1, "training cross-entropy"),
                                 ("acc", 2, "training accuracy")):
        figure, (ours, original) = _figure(12, 4.8, share_y=True)
        for row in ROWS:
            line = {**styles[row.title], "linewidth": 1.4, "marker": ""}
            log, points = logs.get(row.name, []), published[row.name]
            marker = "." if len(log) < 10 else ""  # a line of one point is invisible
            ours.plot([r["step"] for r in log], [r[f"train_{metric}"] for r in log],
                      **{**line, "marker": marker, "label": None})
            original.plot([point[0] for point in points], [point[index] for point in points],
                          **line)
        ours.set(title="this run", xlabel="step", ylabel=label, xlim=(0, None))
        original.set(title="published: RTX 2080, 25,000 images, batch 250", xlabel="step")
        for panel in (ours, original):
            panel.grid(alpha=0.3)
        figure.legend(loc="outside right center", fontsize=8)
        _save_figure(figure, out / f"{metric}.png")


def draw_speed(path: Path, models: list[ModelMeasurement], caption: str) -> None:
    """Images/s against parameters, training beside inference; none of `models` has failed."""
    from matplotlib.ticker import LogLocator
    figure, (training, inference) = _figure(11, 4.8, share_y=True)
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
    _save_figure(figure, path)


def draw_memory(path: Path, measured: list[MemoryMeasurement], caption: str) -> None:
    """Peak memory of training against the batch size, one line per row of the table."""
    figure, panel = _figure(8, 4.8, panels=1)
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
    _save_figure(figure, path)


def _figure(width, height, panels=2, share_y=False):
    """A figure with panels side by side, and the panels."""
    # imported here, because it takes half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=share_y)


def _save_figure(figure, path):
    save_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _row_styles():
    """{row title: line style}: one colour per row of the table, one marker per family."""
    markers = {"resnet18": "o", "efficientnetv2_b0": "s", "vit_linear": "^", "vit_cnn": "v",
               "convmixer": "D"}
    return {row.title: dict(color=f"C{i}", marker=markers[row.arch], label=row.title,
                            linestyle="--" if row.arch == "vit_linear" else "-")
            for i, row in enumerate(ROWS)}
