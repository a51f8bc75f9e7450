"""The log of a run -> a line and a summary; the runs in a folder."""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..experiments import EPOCH_IMAGES, ORIGINAL_CLASSES, ORIGINAL_OPTIONS, ROWS, seed_folder
from ..runtime.errors import InputError, listed
from ..runtime.files import read_csv

# options of a run, not of its recipe; some are of older versions
RUN_OPTIONS = {"rows", "data", "cache", "bad_images", "workers", "data_on_device", "device", "seed",
               "seeds", "out", "resume", "require_acc", "debug"}
# and those that change a weight by rounding at most
NOT_RECIPE = RUN_OPTIONS | {"log_every", "kernels"}


def log_line(entry: dict) -> str:
    """One line of the log, for people."""
    validated = entry["val_acc"] is not None
    return (f"step {entry['step']:>5,}"
            f" | train loss {entry['train_loss']:.4f} acc {entry['train_acc']:.3f}"
            + (f" | val loss {entry['val_loss']:.4f} acc {entry['val_acc']:.3f}"
               if validated else "")
            + f" | {entry['images_per_s']:,.0f} images/s | {entry['memory_mib']:,.0f} MiB")


def summarise(name: str, config, state, *, parameters: int, dtype: str, data: str,
              classes: list[str]) -> dict:
    """summary.json: the final numbers of one run, and what they were measured on."""
    last, best = state.log[-1], state.best or {}
    rate = statistics.median(entry["images_per_s"] for entry in state.log)
    return {
        "name": name, "parameters": parameters, "steps": config.steps, "dtype": dtype, "data": data,
        "classes": classes,
        **{key: getattr(config, key) for key in ("arch", "patch", "depth", "kernel_size",
                                                 "batch_size", "image_size", "seed")},
        **{key: last[key] for key in ("train_loss", "train_acc", "val_loss", "val_acc",
                                      "memory_mib", "skipped", "flops")},
        "best_val_acc": best.get("val_acc"), "best_step": best.get("step"),
        "confusion": state.confusion, "images_per_s": rate,
        f"seconds_per_{EPOCH_IMAGES}_images": EPOCH_IMAGES / rate,
    }


@dataclass(frozen=True)
class Run:
    """A finished run: what its folder says. Each entry of its log has the training images, seconds
    and FLOPs up to its step; the summary has those of the last one.
    """

    summary: dict
    config: dict
    environment: dict
    log: list[dict]

    def option(self, name: str):
        """Its value; None if it is off, or newer than the run."""
        return self.config.get(name) or None


def find_runs(out: Path) -> dict[str, list[Run]]:
    """{row name: its runs by seed} of the finished runs in the folders of `out`, in ROWS' order.

    Folders with other names than `--arch all` and `--seeds` give are skipped. The seconds are
    images over the median images/s of the log entries: a pause, or another job during some of
    them, does not count. Raises InputError if two runs of a row have other options, or one seed.
    """
    found = {row.name: {} for row in ROWS}
    for path in sorted(out.glob("*/summary.json")):
        folder, summary = path.parent, json.loads(path.read_text())
        name, seed = summary["name"], summary["seed"]
        if folder.name not in (name, seed_folder(name, seed)):
            continue
        # what each entry had cost, from the median rate
        log = [entry for entry in read_csv(folder / "log.csv") if entry["step"] <= summary["steps"]]
        for entry in log:  # older logs hold measured seconds, with all disturbances
            entry["images"] = entry["step"] * summary["batch_size"]
            entry["seconds"] = entry["images"] / summary["images_per_s"]
        summary |= {cost: log[-1][cost] for cost in ("images", "seconds", "flops")}
        config, environment = (json.loads((folder / f"{name}.json").read_text())
                               for name in ("config", "environment"))
        run = Run(summary, config, environment, log)
        # seeds of one recipe, each once
        first = next(iter(found.setdefault(name, {}).values()), run)
        differ = [key for key in {**config, **first.config}
                  if key not in NOT_RECIPE and run.option(key) != first.option(key)]
        if seed in found[name] or differ:
            raise InputError(f"{out} holds runs of {name} that differ in {listed(differ)}" if differ
                             else f"{out} holds two runs of {name} with seed {seed}")
        found[name][seed] = run
    return {name: [runs[seed] for seed in sorted(runs)] for name, runs in found.items() if runs}


def on_published_images(runs: dict[str, list[Run]]) -> bool:
    """Whether all runs tell cats from dogs at 192x192, as the published ones."""
    return all(run.summary["classes"] == ORIGINAL_CLASSES
               and run.summary["image_size"] == ORIGINAL_OPTIONS["image_size"]
               for seeds in runs.values() for run in seeds)
