"""The runs in a folder, rows and seeds, side by side: table.md, reproduction.csv and figures."""
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

from ..experiments import BY_NAME, EPOCH_IMAGES, published_curves
from ..runtime.files import write_csv, write_text
from .figures import draw_comparison
from .intervals import accuracy_intervals, best_of, frontier
from .reproduction import compare_curves
from .runs import Run, find_runs, on_published_images
from .tables import number, paragraph, table

TITLES = {name: row.title for name, row in BY_NAME.items()}
# means over the seeds, and what was published if it is about equal images
COLUMNS = [("row", "{row}"), ("parameters", "{parameters:,.0f}"), ("n", "{n}"),
           ("val acc", "{val_acc}"), ("best val acc", "{best_val_acc}"),
           ("train acc", "{train_acc:.3f}"), ("published train acc", "{published_acc:.3f}"),
           ("images/s", "{images_per_s:,.0f}"),
           ("minutes", lambda line: number(line["seconds"] / 60)),
           ("s per 25,000 images", "{seconds_per_25000_images:,.1f}"),
           ("published s/epoch", "{published_epoch_s}"), ("memory MiB", "{memory_mib:,.0f}"),
           ("published MiB", "{published_mib:,}")]
MEANS = ["parameters", "train_acc", "images_per_s", f"seconds_per_{EPOCH_IMAGES}_images",
         "memory_mib", "seconds"]
FACTS = ("data", "image_size", "batch_size", "steps", "dtype", "seed", "device", "torch", "python",
         "date")  # in summary.json and environment.json
NOTES = """\
n: number of seeds; values are their means. {interval}Minutes and seconds are derived from a run's
median images/s. They include data loading, exclude validation and saving, and ignore disturbances
of fewer than half of the log entries. Memory: {memory}."""
INTERVAL = """\
±: half-width of the 95 % confidence interval, {combined} Student's (variance between seeds, pooled
over rows) and Wilson's for {images:,} validation images{per_seed}. """
PUBLISHED = " Published: one RTX 2080, 25,000 images, batch 250, fp16, 5000 steps; nvidia-smi."
COST = """\
Each cell is the last validation within the budget, averaged over seeds ("-": none yet). Budgets:
the images and FLOPs of the run with the fewest, the seconds of the slowest run, and a tenth of
them. *: the best, or its interval overlaps the best one's. Note that a run stopped in mid-schedule
does worse than one scheduled to end there. Frontier: final accuracy against the rows that cost no
more. yes: better than all of them, with intervals that do not overlap. no: worse than one of them,
likewise. tie: neither."""
REPRODUCTION = [("row", "{row}"), ("n", "{seeds}"), ("last step", "{step:,}"), ("acc", "{acc:.3f}"),
                ("published", "{published_acc:.3f}"), ("difference", "{difference:+.3f}"),
                ("inside", "{acc_inside} of {points}"), ("loss", "{loss:.3f}"),
                ("published", "{published_loss:.3f}"), ("inside", "{loss_inside} of {points}")]
POINTS = """\
A point covers 100 steps. It is inside if it lies in the range of our seeds, widened on both sides
by 1.96 standard errors of its 25,000 images. difference: between the accuracies, mean over all
points. reproduction.csv has all points."""
SLACK = 1.02  # a validation counts up to 2 % past the budget


def write_comparison(out: Path, failed: dict[str, str]) -> str:
    """Write table.md, figures and reproduction.csv of the runs in `out`. Returns table.md.

    failed: {folder of a run: why it has no result}.
    """
    runs = find_runs(out)
    points = compare_curves(runs)
    text = comparison_text(runs, points, failed)
    write_text(out / "table.md", text)
    if points:
        write_csv(out / "reproduction.csv", points)
    draw_comparison(out, runs)
    return text


def comparison_text(runs: dict[str, list[Run]], points: Sequence[dict],
                    failed: dict[str, str]) -> str:
    """Markdown: the rows and what they cost, accuracy at equal cost, and the reproduction."""
    text = [f"{folder}: {reason}" for folder, reason in failed.items()]
    if runs:
        text = [main_table(runs), *text, notes(runs)]
    if _least_val_images(runs):
        text.append(cost_text(runs, {}))
    if points:
        text.append(reproduction_text(points))
    return "\n\n".join(text) + "\n"


def main_table(runs: dict[str, list[Run]]) -> str:
    """Ours, means over the seeds, beside what was published for the same images."""
    curves = published_curves() if on_published_images(runs) else {}
    intervals = {key: _intervals(runs, key, {}) for key in ("val_acc", "best_val_acc")}
    lines = []
    for name, seeds in runs.items():
        line = {"row": TITLES.get(name, name), "n": len(seeds),
                **{key: str(by_row.get(name, "-")) for key, by_row in intervals.items()},
                **{key: statistics.fmean(_values(seeds, key)) for key in MEANS}}
        if name in curves:
            line |= vars(BY_NAME[name]) | {"published_acc": curves[name][-1][2]}
        lines.append(line)
    return table(lines, COLUMNS)


def notes(runs: dict[str, list[Run]]) -> str:
    """What was measured, on what, and what the columns mean."""
    finished = [run for seeds in runs.values() for run in seeds]
    facts = {key: sorted({run.environment.get(key, run.summary.get(key)) for run in finished})
             for key in FACTS}
    memory = ("peak of allocated tensors" if any(run.environment["cuda"] for run in finished) else
              "peak resident size of the process, with Python, libraries and mapped images")
    images, shared = _least_val_images(runs), _share_validation(runs)
    interval = INTERVAL.format(
        images=images, combined="the root of the sum of the squares of" if shared else
        "the larger of", per_seed=", the same for all seeds" if shared else " per seed")
    return "\n".join(map(paragraph, [
        "; ".join(f"{key} {' or '.join(map(str, values))}" for key, values in facts.items()),
        NOTES.format(interval=interval if images else "", memory=memory)
        + PUBLISHED * (on_published_images(runs) and not TITLES.keys().isdisjoint(runs))]))


def cost_text(runs: dict[str, list[Run]], others: dict[str, list[Run]]) -> str:
    """Validation accuracy after equal images, seconds and FLOPs, and who is on the frontier.

    others: further runs, not shown; their variance between seeds is pooled, too.
    """
    lines = {name: {"row": TITLES.get(name, name), "n": len(runs[name])} for name in runs}

    # the accuracy within each budget; a star beside the best
    for heading, (cost, budget) in _budgets(runs).items():
        intervals = _intervals(runs, partial(accuracy_at, cost=cost, budget=budget), others)
        best = best_of(intervals)
        for name, line in lines.items():
            line[heading] = f"{intervals.get(name, '-')}{' *' if name in best else ''}"

    # the frontier of the final accuracy
    final = _intervals(runs, "val_acc", others)
    for heading, cost in (("frontier, s", "seconds"), ("frontier, FLOPs", "flops")):
        spent = {name: statistics.fmean(_values(runs[name], cost)) for name in final}
        for name, verdict in frontier(spent, final).items():
            lines[name][heading] = verdict
    headings = dict.fromkeys(heading for line in lines.values() for heading in line)
    columns = [(heading, itemgetter(heading)) for heading in headings]
    return "\n\n".join(["**Validation accuracy at equal cost.**",
                        table(list(lines.values()), columns), paragraph(COST)])


def accuracy_at(run: Run, cost: str, budget: float) -> float | None:
    """Validation accuracy in the last log entry within the budget: images, seconds, flops."""
    within = [entry["val_acc"] for entry in run.log if entry[cost] <= budget * SLACK]
    return within[-1] if within else None


def reproduction_text(points: Sequence[dict]) -> str:
    """How many of the published points our training curves match."""
    def inside(points):
        return {"points": len(points), **{
            key: sum(point[key] for point in points) for key in ("acc_inside", "loss_inside")}}
    lines = []
    for name, row_points in itertools.groupby(points, key=itemgetter("row")):
        row_points = list(row_points)
        difference = statistics.fmean(point["acc"] - point["published_acc"] for point in row_points)
        lines.append({**row_points[-1], **inside(row_points), "row": TITLES[name],
                      "difference": difference})
    return "\n".join([
        "**The reproduction**: runs with the original's recipe, training accuracy and loss beside "
        "the published ones.", "", table(lines, REPRODUCTION), "",
        "The published accuracy is inside at {acc_inside} of {points} points, the published loss "
        "at {loss_inside} of {points}.".format(**inside(points)), paragraph(POINTS)])


def _values(seeds: list[Run], value: str | Callable[[Run], float | None]) -> list[float]:
    """A key of summary.json, or value(run), of all seeds; nothing if one of them lacks it."""
    values = [value(run) if callable(value) else run.summary.get(value) for run in seeds]
    return [] if None in values else values


def _intervals(runs, accuracy, others):
    """{row: Interval} of accuracies over as many images as the smallest validation has."""
    values = {name: _values(seeds, accuracy) for name, seeds in (runs | others).items()}
    intervals = accuracy_intervals(values, _least_val_images(runs), _share_validation(runs))
    return {name: interval for name, interval in intervals.items() if name in runs}


def _least_val_images(runs):
    return min((sum(map(sum, run.summary["confusion"])) for seeds in runs.values()
                for run in seeds if run.summary["confusion"]), default=0)


def _share_validation(runs):
    """Whether runs were validated on a data set's own val folder, and so on equal images."""
    return any(run.config["val_fraction"] is None for seeds in runs.values() for run in seeds)


def _budgets(runs):
    """{column: (cost, budget)} of the table at equal cost."""
    finished = [run for seeds in runs.values() for run in seeds]
    images, seconds, flops = (_values(finished, cost) for cost in ("images", "seconds", "flops"))
    return {f"{min(images):,.0f} images": ("images", min(images)),
            **{f"{number(budget)} s": ("seconds", budget)
               for budget in (max(seconds), max(seconds) / 10)},
            f"{number(min(flops) / 1e12)} TFLOP": ("flops", min(flops))}
