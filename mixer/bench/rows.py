"""The nine rows and their peers, each measured in fresh processes."""
import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import torch

from ..experiments import Row
from ..runtime.device import pick_amp
from ..runtime.processes import attempt
from .candidates import PEERS, build, build_peer
from .data import measure_data
from .measure import Load, announce, compare_training, speed, time_training, visit_model
from .timing import percentiles

# fresh processes per row, minutes apart, so that the spread includes what differs between them
VISITS = 3


def measure_models(config, rows: list[Row], device: torch.device) -> dict[str, list[dict]]:
    """The lists of bench.json: the rows at each image size, and on request peers and data."""
    loads = [Load(config.batch_size, side, device, pick_amp(config.amp, device))
             for side in config.image_size]
    lists = {"models": [model for load in loads for model in measure_rows(config, rows, load)]}
    if config.peers:
        lists["peers"] = [peer for row in rows for peer in measure_peers(config, row, loads[0])]
    if config.data:
        announce(config.data)
        stages, failed = attempt(measure_data, config.data, loads[0], config.repeats)
        lists["data"] = stages or [{"stage": "all", "failed": failed}]
    return lists


def measure_rows(config, rows: list[Row], load: Load) -> list[dict]:
    """What each row takes: counts and memory of its first visit, the times of all."""
    visits, failures = visit_in_turn({
        f"{row.title}, {load.image_size} px": (visit_model, ours(config, row, load), load,
                                               config.repeats // VISITS) for row in rows})
    models = []
    for row, (name, measured) in zip(rows, visits.items(), strict=True):
        model = {"row": row.title, "image_size": load.image_size, "batch_size": load.batch_size}
        if name in failures:
            model["failed"] = failures[name]
        else:
            takes, times = measured[0][0], [ms for _, ms in measured]
            model |= takes | speed(takes, load.batch_size, {
                key: [ms for visit in times for ms in visit[key]] for key in times[0]})
        models.append(model)
    return models


def visit_in_turn(calls: dict[str, tuple]) -> tuple[dict[str, list], dict[str, str]]:
    """{name: (function, *arguments)}, each called in VISITS fresh processes, all of them in turn.

    Returns {name: its results} and {name: why it failed}. One that fails is not called again.
    """
    visits, failures = {name: [] for name in calls}, {}
    for number in range(VISITS):
        for name, call in calls.items():
            if name not in failures:
                announce(f"{name}, visit {number + 1} of {VISITS}")
                result, failed = attempt(*call)
                if failed:
                    failures[name] = failed
                visits[name].append(result)
    return visits, failures


def ours(config, row: Row, load: Load) -> Callable:
    return partial(build, row, load.image_size, load.device, config.kernels, config.compile)


def measure_peers(config, row: Row, load: Load) -> list[dict]:
    """Ours as in the table, and its peer, eager and compiled, at the same precision and with the
    same allocator; then the peer as users run it, in fp32 with glibc's allocator, beside ours as
    train.py starts it. The ratios are ours / peer.
    """
    package = PEERS.get(row.arch)
    if package is None:
        return []
    if not importlib.util.find_spec(package):
        print(f"no peer for {row.title}: it needs {package} (pip install {package})",
              file=sys.stderr)
        return []
    announce(f"{row.title} and {package}'s")
    eager, compiled = (partial(build_peer, row, load.image_size, load.device, compile=compile)
                       for compile in (False, True))
    mine, *peers = compare_training({"ours": ours(config, row, load), package: eager,
                                     f"{package}, compiled": compiled}, load, config.repeats)
    for candidate in (mine, *peers):
        if "failed" not in mine | candidate:
            candidate["memory_ratio"] = mine["training_mib"] / candidate["training_mib"]

    # the allocator belongs to a process
    as_users, repeats = f"{package}, plain fp32", max(1, config.repeats // VISITS)
    times, failures = visit_in_turn({
        f"{row.title}, ours": (time_training, ours(config, row, load), load, repeats, True),
        f"{row.title}, {as_users}": (time_training, eager, load._replace(amp=None), repeats, False),
    })
    measured = {"way": as_users, "batch_size": load.batch_size}
    if failures:
        measured["failed"] = next(iter(failures.values()))
    else:
        mine_ms, theirs = (percentiles(sum(ms, [])) for ms in times.values())
        measured |= theirs | {"faster": mine_ms["ms"] / theirs["ms"]}
    return [{"row": row.title, **candidate} for candidate in (mine, *peers, measured)]
