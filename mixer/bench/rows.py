"""The nine rows and their peers, each measured in fresh processes."""
import importlib.util
import sys
from functools import partial

from ..runtime.processes import attempt
from .candidates import build, build_peer
from .measure import compare_training, say, times_and_floor, visit_model

VISITS = 3  # fresh processes that share a row's repeats, minutes apart: the spread then holds what differs between such


def measure_rows(config, makes, load):
    """The table's rows, and their memory over batch sizes: rows in turn, each in VISITS fresh processes."""
    batches = [config.batch_size] if config.compile else sorted({max(2, config.batch_size // part) for part in (4, 2, 1)})
    rows = {title: {"row": title, "batch_size": config.batch_size} for title in makes}
    times, memory = {title: {} for title in makes}, []
    for visit in range(VISITS):
        for title, make in makes.items():
            if "failed" in rows[title]:
                continue
            say(f"{title}, visit {visit + 1} of {VISITS}")
            result, failed = attempt(visit_model, make, load, config.repeats // VISITS, [] if visit else batches, debug=config.debug)
            counts, at_batches, taken = result or ({}, [], {})
            rows[title] |= {**counts, **failed}
            memory += [{"row": title, **at_batch} for at_batch in at_batches]
            for what, milliseconds in taken.items():
                times[title].setdefault(what, []).extend(milliseconds)
    for title, row in rows.items():
        if "failed" not in row:
            row |= times_and_floor(row, times[title])
    return list(rows.values()), memory


def measure_peers(config, rows, load):
    """Of each row: ours as the table has it, and its peer, eager and compiled, with time_ratio and memory_ratio ours / peer."""
    measured = []
    for row in rows:
        package = "torchvision" if row.arch == "resnet18" else "timm"
        if row.arch == "vit_linear":  # the same network as vit_cnn
            continue
        if not importlib.util.find_spec(package):
            print(f"no peer for {row.title}: it needs {package} (pip install {package})", file=sys.stderr)
            continue
        say(f"{row.title} and {package}'s")
        of = row.arch, row.options, config.image_size, load.device
        makes = {"ours": partial(build, *of, config.kernels, config.compile), package: partial(build_peer, *of, False),
                 f"{package}, compiled": partial(build_peer, *of, True)}
        ours, *others = compare_training(makes, load, config.repeats, config.debug)
        for way in others:
            if not {"failed"} & {*ours, *way}:
                way |= {"time_ratio": way["faster"], "memory_ratio": ours["training_mib"] / way["training_mib"]}
        measured += [{"row": row.title, **way} for way in (ours, *others)]
    return measured
