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
    """What each row takes, from VISITS visits, the rows in turn."""
    # one that fails is not visited again
    visits, failures = {row.title: [] for row in rows}, {}
    for number in range(VISITS):
        for row in rows:
            if row.title not in failures:
                announce(f"{row.title}, {load.image_size} px, visit {number + 1} of {VISITS}")
                visit, failed = attempt(visit_model, ours(config, row, load), load,
                                        config.repeats // VISITS)
                if failed:
                    failures[row.title] = failed
                visits[row.title].append(visit)

    # the counts and memory of the first visit, the times of all
    models = []
    for title, measured in visits.items():
        model = {"row": title, "image_size": load.image_size, "batch_size": load.batch_size}
        if title in failures:
            model["failed"] = failures[title]
        else:
            takes, times = measured[0][0], [ms for _, ms in measured]
            model |= takes | speed(takes, load.batch_size, {
                name: [ms for visit in times for ms in visit[name]] for name in times[0]})
        models.append(model)
    return models


def ours(config, row: Row, load: Load) -> Callable:
    return partial(build, row, load.image_size, load.device, config.kernels, config.compile)


def measure_peers(config, row: Row, load: Load) -> list[dict]:
    """Ours as in the table, and its peer, eager and compiled, at the same precision and with the
    same allocator; then the peer as users run it. The ratios are ours / peer.
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
    for measured in (mine, *peers):
        if "failed" not in mine | measured:
            measured["memory_ratio"] = mine["training_mib"] / measured["training_mib"]
    as_users = time_as_users_run(ours(config, row, load), eager, load, config.repeats)
    peers.append({"way": f"{package}, plain fp32", "batch_size": load.batch_size, **as_users})
    return [{"row": row.title, **measured} for measured in (mine, *peers)]


def time_as_users_run(mine: Callable, theirs: Callable, load: Load, repeats: int) -> dict:
    """The peer in fp32 with glibc's allocator, and the ratio to ours as train.py starts it.

    Both in fresh processes, in turn, since the allocator belongs to a process.
    """
    times = {"mine": [], "theirs": []}
    for _ in range(VISITS):
        for name, make, amp in (("mine", mine, load.amp), ("theirs", theirs, None)):
            ms, failed = attempt(time_training, make, load._replace(amp=amp),
                                 max(1, repeats // VISITS), name == "mine")
            if failed:
                return {"failed": failed}
            times[name] += ms
    row = percentiles(times["theirs"])
    return row | {"faster": percentiles(times["mine"])["ms"] / row["ms"]}
