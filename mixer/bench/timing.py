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
    """{name: callable} -> ({name: Times}, {name: median over the rounds of how much longer it took than the first way})."""
    samples = take_in_turn(ways, rounds, device, clock)
    first = next(iter(samples.values()))
    ratios = {name: statistics.median(b / a for a, b in zip(first, times)) for name, times in samples.items()}
    return {name: summary(times) for name, times in samples.items()}, ratios


def take_in_turn(ways, rounds, device, clock=time.perf_counter):
    """{name: callable} -> {name: milliseconds of each round}.

    Each way is called once to warm up, then all in turn, `rounds` times. On CUDA a callable should queue its work alone;
    what is timed is the work.
    """
    for way in ways.values():
        way()
    samples = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(_one(way, device, clock))
    return samples


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


def settle_allocator():
    """Let a large tensor come and go, as in any training process. Until then glibc gives each freed tensor back to the system, and
    fetching its pages again can take longer than a kernel (a depthwise conv's backward: 28 ms for 12)."""
    torch.zeros(31 * 2**18)  # 31 MiB: glibc learns up to 32


class Ceiling:
    """What the device does at best: a large copy and a large matrix product, to be taken in turn with what is judged by them.

    bytes read and written by `copy`, floating-point operations of `matmul`; neither fits a cache.
    """

    def __init__(self, device, dtype):
        source = torch.ones(2**25, device=device)  # 128 MiB
        target = torch.empty_like(source)
        side = 8192 if device.type == "cuda" else 1536
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        self.bytes, self.flops = 2 * source.nbytes, 2 * side**3
        self.ways = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}


def copy_bandwidth(device):
    """GB/s of a large copy, read and written bytes together: the ceiling of everything that moves an activation."""
    ceiling = Ceiling(device, torch.float32)
    times, _ = race({"copy": ceiling.ways["copy"]}, 9, device)
    return ceiling.bytes / times["copy"].median / 1e6


def several(way, count):
    """A callable that does `way` count times: on a GPU a step's launches hide behind the step before, as they do in training."""
    return way if count == 1 else lambda: [way() for _ in range(count)]
