"""The log of a run -> a line, a summary, a row of the table."""
import statistics

from ..experiments import EPOCH_IMAGES, ROWS, published_curves


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
