"""Validation accuracy of ConvMixer 24 against its kernel size, a line per learning rate.

python results/mixing/kernel_sizes.py

Writes kernel_sizes.png from the runs in ../study-a, ../study-c-* and kernel-*.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from mixer.report.figures import drawing, new_figure, save
from mixer.report.intervals import accuracy_intervals
from mixer.report.studies import find_variants

HERE = Path(__file__).parent
FOLDERS = [HERE.parent / "study-a", *sorted(HERE.parent.glob("study-c-*")),
           *sorted(HERE.glob("kernel-*"))]
VAL_IMAGES = 2500


@drawing
def draw(path):
    accuracies = {}  # {(learning rate, kernel size): of its seeds}
    for seeds in find_variants(FOLDERS)["convmixer-p24"].values():
        config = next(iter(seeds.values())).config
        accuracies[config["lr"], config["kernel_size"]] = [
            run.summary["val_acc"] for run in seeds.values()]
    intervals = accuracy_intervals(accuracies, VAL_IMAGES)

    figure, (panel,) = new_figure(7, 4, 1, title="ConvMixer 24, 1000 steps of 250 images")
    for lr in sorted({lr for lr, _ in intervals}):
        sizes = sorted(size for rate, size in intervals if rate == lr)
        means, halves = zip(*(intervals[lr, size] for size in sizes), strict=True)
        panel.errorbar(sizes, means, halves, fmt="o-", capsize=4, label=f"lr {lr}")
        for size, mean in zip(sizes, means, strict=True):
            panel.annotate(f" n = {len(accuracies[lr, size])}", (size, mean), fontsize=8)
    panel.set(xlabel="kernel size (1: no mixing of positions)", ylabel="validation accuracy",
              xticks=sorted({size for _, size in intervals}))
    panel.legend()
    save(figure, path)


if __name__ == "__main__":
    draw(HERE / "kernel_sizes.png")
