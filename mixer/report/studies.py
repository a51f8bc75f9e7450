"""Several folders of runs side by side, e.g. several learning rates: each row at its best."""
from collections.abc import Sequence
from pathlib import Path

from ..runtime.errors import InputError
from ..runtime.files import write_text
from .comparison import TITLES, cost_text, main_table, notes
from .figures import draw_settings
from .runs import RUN_OPTIONS, Run, find_runs
from .tables import paragraph

CHOSEN = """\
(chosen): the value with the highest best validation accuracy at seed 0. Below, each row is at its
chosen value; if it has other seeds, which had no part in the choice, only those count."""


def write_studies(folders: Sequence[Path], out: Path) -> str:
    """Write table.md and a figure of the runs in all `folders` into `out`. Returns table.md."""
    everything, chosen, rest, points = {}, {}, {}, {}
    for name, variants in find_variants(folders).items():
        # choose by seed 0
        at_seed_0 = {label: runs[0].summary["best_val_acc"] or 0
                     for label, runs in variants.items() if 0 in runs}
        best = max(at_seed_0, key=at_seed_0.get, default=None)
        # report by the other seeds
        for label, runs in sorted(variants.items()):
            title = ", ".join(filter(None, [TITLES.get(name, name), label]))
            several, seeds = len(variants) > 1, list(runs.values())
            everything[title + " (chosen)" * (several and label == best)] = seeds
            if label == best:
                others = [run for seed, run in runs.items() if seed or not several]
                chosen[title] = seeds = others or seeds
            else:
                rest[title] = seeds
            points.setdefault(name, []).append((label == best, seeds))
    text = f"{main_table(everything)}\n\n{notes(everything)}\n{paragraph(CHOSEN)}\n"
    if chosen:
        text += f"\n{cost_text(chosen, rest)}\n"
        draw_settings(out / "val_acc_flops.png", points)
    write_text(out / "table.md", text)
    return text


def find_variants(folders: Sequence[Path]) -> dict[str, dict[str, dict[int, Run]]]:
    """{row name: {"lr 0.001": {seed: run}}}, labelled by the options in which runs of a row differ.

    Raises InputError for two runs with equal options and seeds.
    """
    # all runs of a row
    found = {}
    for folder in folders:
        for name, runs in find_runs(folder).items():
            found.setdefault(name, []).extend(runs)

    options = dict.fromkeys(option for runs in found.values() for run in runs
                            for option in run.config if option not in RUN_OPTIONS)
    differ = [option for option in options
              if any(len({run.option(option) for run in runs}) > 1 for runs in found.values())]
    # a label per combination of these
    variants = {name: {} for name in found}
    for name, runs in found.items():
        for run in runs:
            label = ", ".join(f"{option} {run.option(option)}" for option in differ
                              if run.option(option))
            seeds, seed = variants[name].setdefault(label, {}), run.summary["seed"]
            if seeds.setdefault(seed, run) is not run:
                raise InputError(f"two of these folders hold {name} with seed {seed} and equal "
                                 "options; leave one of them out")
    return variants
