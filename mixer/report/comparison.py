"""The runs in a folder, rows and seeds, side by side: table.md, reproduction.csv and figures."""
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..experiments import BY_NAME, EPOCH_IMAGES, published_curves
from ..runtime.files import write_csv, write_text
from .figures import draw_comparison, draw_costs
from .intervals import Interval, accuracy_intervals, best_of, frontier
from .reproduction import judge
from .runs import Run, find_runs, on_published_images
from .tables import number, paragraph, table

TITLES = {name: row.title for name, row in BY_NAME.items()}
# means over the seeds, and what was published if it is about equal images
COLUMNS = [("row", "{row}"), ("parameters", "{parameters:,.0f}"), ("n", "{n}"),
           ("val acc", "{val_acc}"), ("best val acc", "{best_val_acc}"),
           ("train acc", "{train_acc:.3f}"), ("published train acc", "{published_acc:.3f}"),
           ("images/s", "{images_per_s:,.0f}"), ("minutes", "{minutes}"),
           ("s per 25,000 images", "{seconds_per_25000_images:,.1f}"),
           ("published s/epoch", "{published_epoch_s}"), ("memory MiB", "{memory_mib:,.0f}"),
           ("published MiB", "{published_mib:,}")]
MEANS = ["parameters", "train_acc", "images_per_s", f"seconds_per_{EPOCH_IMAGES}_images",
         "memory_mib"]  # of summary.json
REPRODUCTION = [("row", "{row}"), ("n", "{seeds}"), ("last step", "{step:,}"), ("acc", "{acc:.3f}"),
                ("published", "{published_acc:.3f}"), ("difference", "{difference:+.3f}"),
                ("inside", "{acc_inside} of {points}"), ("loss", "{loss:.3f}"),
                ("published", "{published_loss:.3f}"), ("inside", "{loss_inside} of {points}")]
SLACK = 1.02  # a validation counts up to 2 % past the budget


def write_comparison(out: Path, failed: dict[str, str]) -> str:
    """Write table.md, figures and reproduction.csv of the runs in `out`. Returns table.md.

    failed: {folder of a run: why it has no result}.
    """
    runs = find_runs(out, failed.keys())
    points = judge(runs)
    text = comparison_text(runs, points, expected_rows(out), failed)
    write_text(out / "table.md", text)
    if points:
        write_csv(out / "reproduction.csv", points)
    draw_comparison(out, runs)
    draw_costs(out, runs)
    return text


def expected_rows(out: Path) -> list[str]:
    """The rows that config.json in `out` asks for; they stay in the table without a result."""
    path = out / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    if config.get("arch") != "all":
        return []
    return config["rows"].split(",") if config.get("rows") else list(TITLES)


def comparison_text(runs: dict[str, list[Run]], points: Sequence[dict], names: Sequence[str],
                    failed: dict[str, str]) -> str:
    """Markdown: the rows and what they cost, accuracy at equal cost, and the reproduction.

    names: rows that are in the table without a run too.
    """
    reasons = {folder.split("-seed")[0]: reason for folder, reason in failed.items()}
    there = {*runs, *names, *reasons}
    rows = [name for name in dict.fromkeys([*TITLES, *runs, *reasons]) if name in there]
    text = [main_table(runs, rows, reasons)]
    text += [f"{folder}: {reason}" for folder, reason in failed.items()]
    finished = [run for row in runs.values() for run in row]
    if finished:
        text.append(notes(finished, published=on_published_images(runs)))
    if any(run.val_images for run in finished):
        text.append(cost_text(runs))
    if points:
        text.append(reproduction_text(points))
    return "\n\n".join(text) + "\n"


def main_table(runs: dict[str, list[Run]], rows: Sequence[str], reasons: dict[str, str]) -> str:
    """Ours, beside what was published about equal images; of several seeds the means."""
    curves = published_curves() if on_published_images(runs) else {}
    lines = {name: {"row": TITLES.get(name, name)} for name in rows}
    for name, line in lines.items():
        if name in runs:
            line["n"] = len(runs[name])
        else:
            line["failed"] = reasons.get(name, "not run")
        if curves.get(name):
            line |= vars(BY_NAME[name]) | {"published_acc": curves[name][-1][2]}
    for key in MEANS:
        for name, mean in _means(runs, _summary(key)).items():
            lines[name][key] = mean
    for name, seconds in _means(runs, _spent("seconds")).items():
        lines[name]["minutes"] = seconds / 60
    for key in ("val_acc", "best_val_acc"):
        intervals = _intervals(runs, _summary(key))
        for name, line in lines.items():
            line[key] = _interval_text(intervals.get(name))
    return table(list(lines.values()), COLUMNS)


def notes(runs: list[Run], published: bool) -> str:
    """What was measured, on what, and what was published if that stands beside it."""
    def all_of(key, form="{}", part="summary"):
        values = sorted({getattr(run, part)[key] for run in runs}, key=str)
        return " or ".join(form.format(value) for value in values)
    gpu = any(run.environment["cuda"] for run in runs)
    memory = ("peak of allocated tensors" if gpu else
              "peak resident size of the process, with Python, libraries and mapped images")
    size = all_of("image_size")
    val = min((run.val_images for run in runs if run.val_images), default=0)
    return paragraph(
        f"{all_of('data')}, {size}x{size} pixels, batch {all_of('batch_size')}, "
        f"{all_of('steps', '{:,}')} steps, {all_of('dtype')}, "
        f"seeds {', '.join(map(str, sorted({run.summary['seed'] for run in runs})))}; "
        f"{all_of('device', part='environment')}; torch {all_of('torch', part='environment')}, "
        f"Python {all_of('python', part='environment')}; {all_of('date', part='environment')}."
    ) + "\n" + paragraph(
        "n: seeds. Values are means over them; ±: half of a 95 % interval of the mean. It is "
        "the larger of that of the variance between seeds, pooled over the rows, and the binomial "
        f"one of {val:,} validation images per seed. Minutes and seconds are computed from the "
        "median images/s of a run's lines: data included, validation and saving not, nor what "
        f"disturbed fewer than half of the lines. Memory: {memory}."
        + (" Published: one RTX 2080, 25,000 images, batch 250, fp16, 5000 steps; its memory as "
           "nvidia-smi shows it." if published else ""))


def cost_text(runs: dict[str, list[Run]]) -> str:
    """Validation accuracy after equal images, seconds and FLOPs, and who is on the frontier."""
    lines = {name: {"row": TITLES.get(name, name)} for name in runs}
    columns = ["row"]

    # the accuracy within each budget; a star beside the best
    for heading, (cost, budget) in _budgets(runs).items():
        intervals = _intervals(runs, partial(accuracy_at, cost=cost, budget=budget))
        best = best_of(intervals)
        columns.append(heading)
        for name, line in lines.items():
            line[heading] = _interval_text(intervals.get(name)) + (" *" if name in best else "")

    # the frontier of the final accuracy
    final = _intervals(runs, _summary("val_acc"))
    for heading, cost in (("frontier, s", "seconds"), ("frontier, FLOPs", "flops")):
        spent = _means(runs, _spent(cost))
        columns.append(heading)
        for name, verdict in frontier(spent, {name: final[name] for name in final
                                              if name in spent}).items():
            lines[name][heading] = verdict
    cells = [(heading, lambda line, heading=heading: line[heading]) for heading in columns]
    return "\n".join(["**Validation accuracy at equal cost.**", "", table(
        list(lines.values()), cells), "", paragraph(
        "The last validation within the budget, of each seed; - where there is none. The seconds "
        "are those of the slowest run and a tenth of them; images and FLOPs are those of the run "
        "with the fewest. FLOPs: three times a counted forward pass of each training image. *: the "
        "best, or its interval overlaps the best one's. A run within its schedule is worse than "
        "one whose schedule ends there. Frontier, by the final accuracy against the rows that "
        "cost no more. yes: better than all of them, intervals apart. no: one of them is better, "
        "intervals apart. tie: neither.")])


def accuracy_at(run: Run, cost: str, budget: float) -> float | None:
    """Validation accuracy in the last row of the log within the budget: images, seconds, flops."""
    within = [row["val_acc"] for row in run.log
              if row[cost] is not None and row[cost] <= budget * SLACK]
    return within[-1] if within else None


def reproduction_text(points: Sequence[dict]) -> str:
    """At how many of the published points our training curves are where the original's are."""
    def inside(points):
        return {key: sum(point[key] for point in points) for key in ("acc_inside", "loss_inside")}
    lines = []
    for name in dict.fromkeys(point["row"] for point in points):
        of_row = [point for point in points if point["row"] == name]
        difference = statistics.fmean(point["acc"] - point["published_acc"] for point in of_row)
        lines.append({**of_row[-1], **inside(of_row), "row": TITLES[name], "points": len(of_row),
                      "difference": difference})
    return "\n".join([
        "**The reproduction**: runs with the original's recipe, training accuracy and loss beside "
        "the published ones.", "", table(lines, REPRODUCTION), "",
        "The published accuracy is inside at {acc_inside} of {n} points, the published loss at "
        "{loss_inside} of {n}.".format(n=len(points), **inside(points)), paragraph(
            "A point covers 100 steps. It is inside if it lies in the range of our seeds, widened "
            "on both sides by 1.96 standard errors of 25,000 draws. difference: of the accuracies, "
            "mean of all points. reproduction.csv has all points.")])


def _interval_text(interval: Interval | None) -> str:
    return f"{interval.mean:.3f} ± {interval.half:.3f}" if interval else "-"


def _summary(key):
    return lambda run: run.summary.get(key)


def _spent(cost):
    return lambda run: run.log[-1][cost]


def _of_seeds(runs, value):
    """{row: value(run) of its seeds}, without None."""
    return {name: [v for run in seeds if (v := value(run)) is not None]
            for name, seeds in runs.items()}


def _means(runs, value):
    return {name: statistics.fmean(values) for name, values in _of_seeds(runs, value).items()
            if values}


def _intervals(runs, accuracy):
    """{row: Interval} of accuracies over as many images as the smallest validation has."""
    images = [run.val_images for seeds in runs.values() for run in seeds if run.val_images]
    return accuracy_intervals(_of_seeds(runs, accuracy), min(images, default=0))


def _budgets(runs):
    """{column: (cost, budget)} of the table at equal cost."""
    images, seconds, flops = (
        sum(_of_seeds(runs, _spent(cost)).values(), [])
        for cost in ("images", "seconds", "flops"))
    budgets = {f"{min(images):,.0f} images": ("images", min(images))}
    for budget in (max(seconds), max(seconds) / 10) if seconds else ():
        budgets[f"{_short(budget)} s"] = "seconds", budget
    if flops:
        budgets[f"{_short(min(flops) / 1e12)} TFLOP"] = "flops", min(flops)
    return budgets


def _short(value):
    return number(value) if value >= 1 else f"{value:.2g}"
