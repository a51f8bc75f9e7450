"""Time several ways of doing one thing, in turn, so that a noisy machine is noisy for all of them."""
import statistics
import time
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Milliseconds over the rounds of one race."""
    median: float
    p20: float
    p80: float


def race(ways, rounds, device, clock=time.perf_counter):
    """{name: callable} -> ({name: Times}, {name: median over the rounds of how much longer it took than the first way}).

    Each way is called once to warm up, then all in turn, `rounds` times. On CUDA a callable should queue its work alone;
    what is timed is the work.
    """
    for way in ways.values():
        way()
    samples = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(_one(way, device, clock))
    first = next(iter(samples.values()))
    ratios = {name: statistics.median(b / a for a, b in zip(first, times)) for name, times in samples.items()}
    return {name: summary(times) for name, times in samples.items()}, ratios


def _one(way, device, clock):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    start = clock()
    way()
    return 1000 * (clock() - start)


def summary(milliseconds):
    ordered = sorted(milliseconds)
    return Times(statistics.median(ordered), ordered[int(0.2 * len(ordered))], ordered[int(0.8 * len(ordered))])


def captured(step, sets, device):
    """A callable that does step(s) for each s of `sets`, on CUDA from one graph, so that launches take no time."""
    if device.type != "cuda":
        return lambda: [step(s) for s in sets]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            for s in sets:
                step(s)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for s in sets:
            step(s)
    return graph.replay


def copy_bandwidth(device):
    """GB/s of a large copy, read and written bytes together: the ceiling of everything that moves an activation."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    times, _ = race({"copy": lambda: target.copy_(source)}, 9, device)
    return 2 * source.nbytes / times["copy"].median / 1e6
