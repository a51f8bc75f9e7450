"""The nine rows and their peers, each measured in fresh processes."""
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import torch

from ..experiments import Row
from ..report.measurements import (
    MemoryMeasurement,
    ModelMeasurement,
    ResolutionMeasurement,
    StepMeasurement,
)
from ..runtime.device import pick_amp
from ..runtime.processes import attempt
from .candidates import build, build_peer
from .data import measure_stages
from .measure import (
    Load,
    Samples,
    Visit,
    announce,
    compare_training,
    speed,
    time_training,
    time_training_as_train_py,
    visit_model,
)
from .timing import summary

# fresh processes per row, minutes apart, so that the spread includes what differs between them
VISITS = 3


def measure_models(config, rows: list[Row], device: torch.device) -> dict[str, list]:
    """The lists of bench.json: the rows, their memory, and on request their peers and the data."""
    load = Load(config.batch_size, config.image_size, device, pick_amp(config.amp, device))
    models, memory = measure_rows(config, our_models(config, rows, load), load)
    lists = {"models": models, "memory": memory}
    if config.peers:
        lists["peers"] = measure_peers(config, rows, load)
    if config.data:
        lists["data"] = measure_stages(config, load)
    return lists


def measure_resolution(config, rows: list[Row],
                       device: torch.device) -> dict[str, list[ResolutionMeasurement]]:
    """The list of resolution.json: the rows at each of several image sizes."""
    results = []
    for side in config.image_size:
        announce(f"{side}x{side} pixels")
        load = Load(config.batch_size, side, device, pick_amp(config.amp, device))
        models, _ = measure_rows(config, our_models(config, rows, load), load)
        results += [ResolutionMeasurement(**vars(model), image_size=side) for model in models]
    return {"resolution": results}


def our_models(config, rows: list[Row], load: Load) -> dict[str, Callable]:
    """{title: make} of the rows."""
    return {row.title: partial(build, row.arch, row.options, load.image_size, load.device,
                               config.kernels, config.compile) for row in rows}


def measure_rows(config, candidates: dict[str, Callable],
                 load: Load) -> tuple[list[ModelMeasurement], list[MemoryMeasurement]]:
    """Visit each candidate {title: make} VISITS times, the candidates in turn."""
    batches = [load.batch_size]
    if not config.compile:
        batches = sorted({max(2, load.batch_size // divisor) for divisor in (4, 2, 1)})

    # one that fails is not visited again
    visits, failures = {title: [] for title in candidates}, {}
    for number in range(VISITS):
        for title, make in candidates.items():
            if title in failures:
                continue
            announce(f"{title}, visit {number + 1} of {VISITS}")
            visit, failed = attempt(visit_model, make, load, config.repeats // VISITS,
                                    [] if number else batches, debug=config.debug)
            if failed:
                failures[title] = failed
            else:
                visits[title].append(visit)

    # one row each, and its memory at each batch size
    models = [summarise(title, load.batch_size, visits[title], failures.get(title))
              for title in candidates]
    memory = [MemoryMeasurement(title, batch, m) for title in candidates if visits[title]
              for batch, m in zip(batches, visits[title][0].memory, strict=True)]
    return models, memory


def summarise(title: str, batch: int, visits: list[Visit],
              failed: str | None) -> ModelMeasurement:
    """One row of the table from all its visits; one that failed has what came before."""
    if not visits:
        return ModelMeasurement(title, batch, failed=failed)
    counts, memory, _ = visits[0]
    samples = Samples(training=[ms for visit in visits for ms in visit.samples.training],
                      inference=[ms for visit in visits for ms in visit.samples.inference],
                      gflop=[ms for visit in visits for ms in visit.samples.gflop],
                      gb=[ms for visit in visits for ms in visit.samples.gb])
    return ModelMeasurement(title, batch, counts, memory[-1],
                            None if failed else speed(counts, batch, samples), failed)


def measure_peers(config, rows: list[Row], load: Load) -> list[StepMeasurement]:
    """Of each row: ours as in the table, and its peer, eager and compiled, at the same precision
    and with the same allocator; and the peer as users run it: fp32, the default allocator."""
    results = []
    for row in rows:
        package = "torchvision" if row.arch == "resnet18" else "timm"
        if row.arch == "vit_linear":  # the same network as vit_cnn
            continue
        if not importlib.util.find_spec(package):
            print(f"no peer for {row.title}: it needs {package} (pip install {package})",
                  file=sys.stderr)
            continue
        announce(f"{row.title} and {package}'s")
        model = row.arch, row.options, config.image_size, load.device
        theirs = partial(build_peer, *model)
        ours, *peers = compare_training({
            "ours": partial(build, *model, config.kernels, config.compile),
            package: partial(theirs, compile=False),
            f"{package}, compiled": partial(theirs, compile=True),
        }, load, config.repeats, config.debug)
        results.append(dataclasses.replace(ours, row=row.title))
        results += [with_ratios(ours, peer, row.title) for peer in peers]
        as_users = measure_as_users_run(
            f"{package}, plain fp32", partial(theirs, compile=False),
            partial(build, *model, config.kernels, config.compile), load, config)
        results.append(dataclasses.replace(as_users, row=row.title))
    return results


def measure_as_users_run(way: str, theirs: Callable, ours: Callable, load: Load,
                         config) -> StepMeasurement:
    """The peer in a plain fp32 loop; time_ratio compares ours as train.py starts it.

    Both in fresh processes, in turn, since the allocator belongs to a process.
    """
    times = {"ours": [], way: []}
    for _ in range(VISITS):
        for name, function, make, amp in (("ours", time_training_as_train_py, ours, load.amp),
                                          (way, time_training, theirs, None)):
            ms, failed = attempt(function, make, load._replace(amp=amp),
                                 max(1, config.repeats // VISITS), debug=config.debug)
            if failed:
                return StepMeasurement(way=way, batch_size=load.batch_size, failed=failed)
            times[name] += ms
    mine, peer = summary(times["ours"]), summary(times[way])
    return StepMeasurement(way=way, batch_size=load.batch_size, ms=peer.median, p20=peer.p20,
                           p80=peer.p80, faster=mine.median / peer.median,
                           time_ratio=mine.median / peer.median)


def with_ratios(ours: StepMeasurement, peer: StepMeasurement, title: str) -> StepMeasurement:
    """The peer of row `title`, with ours / peer in time and memory unless one of them failed."""
    if ours.failed or peer.failed:
        return dataclasses.replace(peer, row=title)
    return dataclasses.replace(
        peer, row=title, time_ratio=peer.faster,
        memory_ratio=ours.memory.training_mib / peer.memory.training_mib)
