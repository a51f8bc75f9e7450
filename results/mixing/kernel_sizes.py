"""ConvMixers with other kernel sizes and learning rates: accuracy, a line per learning rate.

python results/mixing/kernel_sizes.py

Writes table.md and kernel_sizes.png from the runs in ../study-a, ../study-c-* and kernel-*.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from mixer.report.comparison import TITLES
from mixer.report.figures import drawing, new_figure, save
from mixer.report.intervals import accuracy_intervals
from mixer.report.runs import find_runs
from mixer.report.tables import table

HERE = Path(__file__).parent
FOLDERS = [HERE.parent / "study-a", *sorted(HERE.parent.glob("study-c-*")),
           *sorted(HERE.glob("kernel-*"))]
NAMES, VAL_IMAGES = ("convmixer-p24", "convmixer-p16"), 2500
COLUMNS = [("row", "{row}"), ("kernel size", "{size}"), ("lr", "{lr}"), ("n", "{n}"),
           ("parameters", "{parameters:,}"), ("train acc", "{train_acc:.3f}"),
           ("val acc", "{val_acc}")]


def find_settings():
    """{(row name, kernel size, learning rate): its runs}, in order."""
    settings = {}
    for folder in FOLDERS:
        for name, runs in find_runs(folder).items():
            for run in runs if name in NAMES else ():
                key = name, run.config["kernel_size"], run.config["lr"]
                settings.setdefault(key, []).append(run)
    return {key: settings[key] for name in NAMES for key in sorted(settings) if key[0] == name}


def find_intervals(settings):
    """{setting: Interval of its validation accuracy}"""
    return accuracy_intervals({key: [run.summary["val_acc"] for run in runs]
                               for key, runs in settings.items()}, VAL_IMAGES)


def as_table(settings):
    intervals = find_intervals(settings)
    return table([{"row": TITLES[name], "size": size, "lr": str(lr), "n": len(runs),
                   "parameters": runs[0].summary["parameters"],
                   "train_acc": statistics.fmean(run.summary["train_acc"] for run in runs),
                   "val_acc": intervals[name, size, lr]}
                  for (name, size, lr), runs in settings.items()], COLUMNS) + "\n"


@drawing
def draw(path, settings):
    figure, panels = new_figure(10, 4, len(NAMES), sharey=True)
    intervals = find_intervals(settings)
    for panel, row in zip(panels, NAMES, strict=True):
        for color, lr in enumerate(sorted({lr for _, _, lr in settings})):
            sizes = [size for name, size, rate in settings if (name, rate) == (row, lr)]
            if sizes:
                means, halves = zip(*(intervals[row, size, lr] for size in sizes), strict=True)
                panel.errorbar(sizes, means, halves, fmt="o-", color=f"C{color}", capsize=4,
                               label=f"lr {lr}")
        panel.set(title=TITLES[row], xlabel="kernel size (1: positions are not mixed)",
                  ylabel="validation accuracy",
                  xticks=sorted({size for name, size, _ in settings if name == row}))
        panel.legend()
    save(figure, path)


if __name__ == "__main__":
    settings = find_settings()
    (HERE / "table.md").write_text(as_table(settings))
    draw(HERE / "kernel_sizes.png", settings)
    print(as_table(settings))
