"""The log of a run -> a line, a summary, a row of the table."""
import statistics

from ..experiments import EPOCH_IMAGES, ROWS, Row, published_curves
from .tables import aligned


def describe(row: dict) -> str:
    """One line of the log, for people."""
    words = [f"step {row['step']:>5,}",
             f"train loss {row['train_loss']:.4f} acc {row['train_acc']:.3f}"]
    if row["val_acc"] is not None:
        words.append(f"val loss {row['val_loss']:.4f} acc {row['val_acc']:.3f}")
    if row["images_per_s"]:
        words.append(f"{row['images_per_s']:,.0f} images/s, {row['data_wait']:.0%} of it data")
    words.append(f"{row['memory_mib']:,.0f} MiB")
    if row["skipped"]:
        words.append(f"{row['skipped']} steps skipped")
    return " | ".join(words)


def summarise(name: str, config, state, *, steps: int, parameters: int, dtype: str, data: str,
              classes: list[str]) -> dict:
    """summary.json: the final numbers of one run, and what they were measured on."""
    last = state.rows[-1]
    rates = [row["images_per_s"] for row in state.rows if row["images_per_s"]]
    rate = statistics.median(rates) if rates else None
    return {
        "name": name, "arch": config.arch, "patch": config.patch, "depth": config.depth,
        "kernel_size": config.kernel_size, "parameters": parameters,
        "batch_size": config.batch_size, "image_size": config.image_size, "steps": steps,
        "dtype": dtype, "seed": config.seed, "data": data, "classes": classes,
        "train_loss": last["train_loss"], "train_acc": last["train_acc"],
        "val_loss": last["val_loss"], "val_acc": last["val_acc"],
        "best_val_acc": state.best and state.best["val_acc"],
        "best_step": state.best and state.best["step"],
        "confusion": state.confusion,
        "images_per_s": rate,
        f"seconds_per_{EPOCH_IMAGES}_images": EPOCH_IMAGES / rate if rate else None,
        "memory_mib": last["memory_mib"], "skipped": last["skipped"],
    }


COLUMNS = ["row", "parameters", "val acc", "best val acc", "train acc", "published train acc",
           "images/s", "s per 25,000 images", "published s/epoch", "memory MiB", "published MiB"]


def comparison_table(summaries: dict[str, dict | str], env: dict) -> str:
    """Markdown: the nine rows, ours beside what was published, and what each column means.

    summaries: {row name: summary.json of a finished run, or a sentence saying why there is none}.
    """
    curves = published_curves()
    table = aligned(COLUMNS, [_cells(row, summaries.get(row.name, "not run"),
                                     published_acc=curves[row.name][-1][2]) for row in ROWS])
    finished = [s for s in summaries.values() if isinstance(s, dict)]
    return table + "\n" + (_notes(finished[0], env) if finished else "")


def _cells(row: Row, summary: dict | str, published_acc: float) -> list[str]:
    """One line of the table, in the order of COLUMNS."""
    failed = isinstance(summary, str)
    s = {} if failed else summary

    def cell(key, form):
        return "" if s.get(key) is None else format(s[key], form)
    return [row.title, summary if failed else cell("parameters", ","), cell("val_acc", ".3f"),
            cell("best_val_acc", ".3f"), cell("train_acc", ".3f"), f"{published_acc:.3f}",
            cell("images_per_s", ",.0f"), cell(f"seconds_per_{EPOCH_IMAGES}_images", ",.1f"),
            str(row.published_epoch_s), cell("memory_mib", ",.0f"), f"{row.published_mib:,}"]


def _notes(s: dict, env: dict) -> str:
    """What was measured, on what, and what was published; `s` is the summary of one row."""
    memory = ("peak of allocated tensors" if env["cuda"] else
              "peak resident size of the process, Python and libraries included")
    return (f"\n{s['data']}, {s['image_size']}x{s['image_size']} pixels, batch {s['batch_size']}, "
            f"{s['steps']:,} steps, {s['dtype']}, seed {s['seed']}, one run a row; "
            f"{env['device']}; torch {env['torch']}, Python {env['python']}; {env['date']}.\n"
            "Seconds per 25,000 images are computed from the measured images/s (data included, "
            f"validation not). Memory: {memory}. Published: one RTX 2080, 25,000 images, batch "
            "250, fp16, 5000 steps; its memory as nvidia-smi shows it.\n")
