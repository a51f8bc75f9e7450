"""The runs in a folder, rows and seeds, side by side: table.md, reproduction.csv and figures."""
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..experiments import BY_NAME, EPOCH_IMAGES, published_curves
from ..runtime.files import write_csv, write_text
from .figures import draw_comparison, draw_costs
from .intervals import Interval, accuracy_intervals, best_of, frontier
from .reproduction import Point, judge
from .runs import Run, find_runs, on_published_images
from .tables import aligned, number, paragraph

TITLES = {name: row.title for name, row in BY_NAME.items()}
COLUMNS = ["row", "parameters", "n", "val acc", "best val acc", "train acc", "published train acc",
           "images/s", "minutes", "s per 25,000 images", "published s/epoch", "memory MiB",
           "published MiB"]
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
        write_csv(out / "reproduction.csv", [vars(point) for point in points])
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


def comparison_text(runs: dict[str, list[Run]], points: Sequence[Point], names: Sequence[str],
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
    published = BY_NAME if on_published_images(runs) else {}
    curves = published_curves()
    val, best = (accuracy_intervals(_of_seeds(runs, key), _draws(runs))
                 for key in ("val_acc", "best_val_acc"))
    seconds, lines = _spent(runs, "seconds"), []
    for name in rows:
        seeds = runs.get(name, [])

        def mean(key, form, seeds=seeds):
            values = [s.summary[key] for s in seeds if s.summary.get(key) is not None]
            return format(statistics.fmean(values), form) if values else ""
        first = mean("parameters", ",.0f") if seeds else reasons.get(name, "not run")
        theirs = published.get(name)
        lines.append([
            TITLES.get(name, name), first, len(seeds) or "", _cell(val.get(name)),
            _cell(best.get(name)), mean("train_acc", ".3f"),
            f"{curves[name][-1][2]:.3f}" if theirs else "",
            mean("images_per_s", ",.0f"),
            number(seconds[name] / 60) if name in seconds else "",
            mean(f"seconds_per_{EPOCH_IMAGES}_images", ",.1f"),
            theirs.published_epoch_s if theirs else "", mean("memory_mib", ",.0f"),
            f"{theirs.published_mib:,}" if theirs else ""])
    kept = [i for i, column in enumerate(COLUMNS) if published or "published" not in column]
    return aligned([COLUMNS[i] for i in kept], [[line[i] for i in kept] for line in lines])


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
    budgets = _budgets(runs)
    draws, lines = _draws(runs), {name: [TITLES.get(name, name)] for name in runs}
    for cost, budget in budgets.values():
        at = {name: [acc for run in seeds if (acc := accuracy_at(run, cost, budget)) is not None]
              for name, seeds in runs.items()}
        intervals = accuracy_intervals(at, draws)
        best = best_of(intervals)
        for name, line in lines.items():
            line.append(_cell(intervals.get(name)) + (" *" if name in best else ""))
    final = accuracy_intervals(_of_seeds(runs, "val_acc"), draws)
    for cost in ("seconds", "flops"):
        spent = _spent(runs, cost)
        verdicts = frontier(spent, {name: final[name] for name in final if name in spent})
        for name, line in lines.items():
            line.append(verdicts.get(name, ""))
    table = aligned(["row", *budgets, "frontier, s", "frontier, FLOPs"], list(lines.values()))
    return "\n".join(["**Validation accuracy at equal cost.**", "", table, "", paragraph(
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


def reproduction_text(points: Sequence[Point]) -> str:
    """At how many of the published points our training curves are where the original's are."""
    lines = []
    for name in dict.fromkeys(point.row for point in points):
        of_row = [point for point in points if point.row == name]
        n, last = len(of_row), of_row[-1]
        difference = statistics.fmean(point.acc - point.published_acc for point in of_row)
        lines.append([TITLES[name], last.seeds, f"{last.step:,}", f"{last.acc:.3f}",
                      f"{last.published_acc:.3f}", f"{difference:+.3f}",
                      f"{_count(of_row, 'acc')} of {n}",
                      f"{last.loss:.3f}", f"{last.published_loss:.3f}",
                      f"{_count(of_row, 'loss')} of {n}"])
    n = len(points)
    return "\n".join([
        "**The reproduction**: runs with the original's recipe, training accuracy and loss beside "
        "the published ones.", "",
        aligned(["row", "n", "last step", "acc", "published", "difference", "inside", "loss",
                 "published", "inside"], lines), "",
        f"The published accuracy is inside at {_count(points, 'acc')} of {n} points, the published "
        f"loss at {_count(points, 'loss')} of {n}.", paragraph(
            "A point covers 100 steps. It is inside if it lies in the range of our seeds, widened "
            "on both sides by 1.96 standard errors of 25,000 draws. difference: of the accuracies, "
            "mean of all points. reproduction.csv has all points.")])


def _count(points, metric):
    return sum(getattr(point, f"{metric}_inside") for point in points)


def _cell(interval: Interval | None) -> str:
    return f"{interval.mean:.3f} ± {interval.half:.3f}" if interval else "-"


def _of_seeds(runs, key):
    return {name: [run.summary[key] for run in seeds if run.summary[key] is not None]
            for name, seeds in runs.items()}


def _draws(runs):
    """Validation images of a run, the fewest of all."""
    return min((run.val_images for seeds in runs.values() for run in seeds if run.val_images),
               default=0)


def _spent(runs, cost):
    """{row: what its runs cost, the mean of the seeds}, where the log has it."""
    spent = {name: [run.log[-1][cost] for run in seeds if run.log[-1][cost] is not None]
             for name, seeds in runs.items()}
    return {name: statistics.fmean(values) for name, values in spent.items() if values}


def _budgets(runs):
    """{column: (cost, budget)} of the table at equal cost."""
    ends = {cost: [run.log[-1][cost] for seeds in runs.values() for run in seeds
                   if run.log[-1][cost] is not None] for cost in ("images", "seconds", "flops")}
    def short(value):
        return number(value) if value >= 1 else f"{value:.2g}"
    images = min(ends["images"])
    budgets = {f"{images:,.0f} images": ("images", images)}
    if ends["seconds"]:
        slowest = max(ends["seconds"])
        budgets |= {f"{short(seconds)} s": ("seconds", seconds)
                    for seconds in (slowest, slowest / 10)}
    if ends["flops"]:
        fewest = min(ends["flops"])
        budgets[f"{short(fewest / 1e12)} TFLOP"] = "flops", fewest
    return budgets
