"""Logs and measurements -> figures; the only place that imports matplotlib."""
from ..experiments import ROWS, published_curves
from ..runtime.files import save_atomically


def _figure(width, height, panels=2, share_y=False):
    """A figure with panels side by side, and the panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second to import
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=share_y)


def _save_figure(figure, path):
    save_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def draw_curves(path, rows, title):
    """Loss and accuracy of one run over its steps, training and validation."""
    figure, axes = _figure(10, 3.8)
    for axis, what in zip(axes, ("loss", "acc")):
        for part, style in (("train", "-"), ("val", "o-")):
            points = [(row["step"], row[f"{part}_{what}"]) for row in rows if row[f"{part}_{what}"] is not None]
            if points:
                axis.plot(*zip(*points), style, markersize=3, label={"train": "training", "val": "validation"}[part])
        axis.set(xlabel="step", ylabel={"loss": "cross-entropy", "acc": "accuracy"}[what])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    _save_figure(figure, path)


def draw_comparison(out, logs):
    """loss.png and acc.png in the folder `out`: training curves of the rows in `logs` {name: rows}, the published ones beside.

    One colour a row of the table; the left panel is this run, the right one the original, on the same axes.
    """
    published, styles = published_curves(), _row_styles()
    for what, index, label in (("loss", 1, "training cross-entropy"), ("acc", 2, "training accuracy")):
        figure, (ours, original) = _figure(12, 4.8, share_y=True)
        for row in ROWS:
            line = {**styles[row.title], "linewidth": 1.4, "marker": ""}
            log = logs.get(row.name, [])
            ours.plot([r["step"] for r in log], [r[f"train_{what}"] for r in log],
                      **{**line, "marker": "." if len(log) < 10 else "", "label": None})
            original.plot([p[0] for p in published[row.name]], [p[index] for p in published[row.name]], **line)
        ours.set(title="this run", xlabel="step", ylabel=label, xlim=(0, None))
        original.set(title="published: RTX 2080, 25,000 images, batch 250", xlabel="step")
        for axis in (ours, original):
            axis.grid(alpha=0.3)
        figure.legend(loc="outside right center", fontsize=8)
        _save_figure(figure, out / f"{what}.png")


def _row_styles():
    """{row title: how it is drawn}: one colour a row of the table, a marker for its family."""
    markers = {"resnet18": "o", "efficientnetv2_b0": "s", "vit_linear": "^", "vit_cnn": "v", "convmixer": "D"}
    return {row.title: dict(color=f"C{i}", marker=markers[row.arch], linestyle="--" if row.arch == "vit_linear" else "-", label=row.title)
            for i, row in enumerate(ROWS)}


def draw_speed(path, rows, caption):
    """Images/s against parameters, training and inference beside each other; `rows` as bench.py measures them."""
    from matplotlib.ticker import LogLocator
    figure, panels = _figure(11, 4.8, share_y=True)
    for panel, what in zip(panels, ("training", "inference")):
        for row in rows:
            panel.errorbar(row["parameters"] / 1e6, row[f"{what}_images_per_s"], markersize=8, **_row_styles()[row["row"]],
                           yerr=[[row[f"{what}_images_per_s"] - 1000 * row["batch_size"] / row[f"{what}_p80"]],
                                 [1000 * row["batch_size"] / row[f"{what}_p20"] - row[f"{what}_images_per_s"]]])
        panel.set(title=what, xlabel="parameters, millions", xlim=(0, None), yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("images/s: median, p20 and p80")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    _save_figure(figure, path)


def draw_memory(path, rows, caption):
    """Memory of training against the batch size, a line for each row; `rows` as bench.py measures them."""
    figure, panel = _figure(8, 4.8, panels=1)
    for title, style in _row_styles().items():
        points = [(row["batch_size"], row["training_mib"]) for row in rows if row["row"] == title]
        if points:
            panel.plot(*zip(*points), markersize=5, **style)
    what = "that the process grew by" if rows[0]["allocated_mib"] is None else "of allocated tensors"
    panel.set(xlabel="batch size", ylabel=f"peak MiB {what}", xlim=(0, None), ylim=(0, None))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    _save_figure(figure, path)
