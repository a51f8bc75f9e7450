"""Logs -> tables and curves; and what machine and versions they were made with."""
import datetime
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version

import torch

from ..experiments import EPOCH_IMAGES, ROWS, published_curves
from ..runtime.files import save_atomically

PACKAGES = ("torch", "triton", "numpy", "pillow")


def environment(device):
    """Machine and versions, as plain values."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"date": datetime.date.today().isoformat(), "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
            "cuda": torch.version.cuda if device.type == "cuda" else None, **versions}


def describe(row):
    """One line of the log, for people."""
    parts = [f"step {row['step']:>5,}", f"train loss {row['train_loss']:.4f} acc {row['train_acc']:.3f}"]
    if row["val_acc"] is not None:
        parts.append(f"val loss {row['val_loss']:.4f} acc {row['val_acc']:.3f}")
    if row["images_per_s"]:
        parts.append(f"{row['images_per_s']:,.0f} images/s, {row['data_wait']:.0%} of it data")
    parts.append(f"{row['memory_mib']:,.0f} MiB")
    return " | ".join(parts + ([f"{row['skipped']} steps skipped"] if row["skipped"] else []))


def summarise(name, config, state, *, steps, parameters, dtype, data, classes):
    """summary.json: the final numbers of one run, and what they were measured on."""
    last, rates = state.rows[-1], [row["images_per_s"] for row in state.rows if row["images_per_s"]]
    rate = statistics.median(rates) if rates else None
    return {
        "name": name, "arch": config.arch, "patch": config.patch, "depth": config.depth, "kernel_size": config.kernel_size,
        "parameters": parameters, "batch_size": config.batch_size, "image_size": config.image_size, "steps": steps,
        "dtype": dtype, "seed": config.seed, "data": data, "classes": classes,
        "train_loss": last["train_loss"], "train_acc": last["train_acc"],
        "val_loss": last["val_loss"], "val_acc": last["val_acc"],
        "best_val_acc": state.best and state.best["val_acc"], "best_step": state.best and state.best["step"],
        "confusion": state.confusion,
        "images_per_s": rate, f"seconds_per_{EPOCH_IMAGES}_images": EPOCH_IMAGES / rate if rate else None,
        "memory_mib": last["memory_mib"], "skipped": last["skipped"],
    }


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


def comparison_table(summaries, env):
    """Markdown: the nine rows, ours beside what was published, and what each column means.

    summaries: {row name: summary.json of a finished run, or a sentence saying why there is none}.
    """
    finished = [s for s in summaries.values() if isinstance(s, dict)]
    lines = ["| row | parameters | val acc | best val acc | train acc | published train acc | images/s "
             "| s per 25,000 images | published s/epoch | memory MiB | published MiB |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]

    def number(value, form):
        return "" if value is None else format(value, form)

    published = {name: points[-1][2] for name, points in published_curves().items()}
    for row in ROWS:
        s = summaries.get(row.name, "not run")
        ours = [s] + [""] * 7 if isinstance(s, str) else [
            f"{s['parameters']:,}", number(s["val_acc"], ".3f"), number(s["best_val_acc"], ".3f"), f"{s['train_acc']:.3f}",
            number(s["images_per_s"], ",.0f"), number(s[f"seconds_per_{EPOCH_IMAGES}_images"], ",.1f"), f"{s['memory_mib']:,.0f}"]
        cells = [row.title, *ours[:4], f"{published[row.name]:.3f}", *ours[4:6], str(row.published_epoch_s), ours[6],
                 f"{row.published_mib:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    if finished:
        s = finished[0]
        memory = "peak of allocated tensors" if env["cuda"] else "peak resident size of the process, Python and libraries included"
        lines += ["", f"{s['data']}, {s['image_size']}x{s['image_size']} pixels, batch {s['batch_size']}, {s['steps']:,} steps, "
                  f"{s['dtype']}, seed {s['seed']}, one run a row; {env['device']}; torch {env['torch']}, Python {env['python']}; "
                  f"{env['date']}.",
                  f"Seconds per 25,000 images are computed from the measured images/s (data included, validation not). Memory: {memory}. "
                  "Published: one RTX 2080, 25,000 images, batch 250, fp16, 5000 steps; its memory as nvidia-smi shows it."]
    return "\n".join(lines) + "\n"
