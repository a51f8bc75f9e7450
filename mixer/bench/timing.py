"""Time several ways to do one thing, in turn, so that a noisy machine is noisy for all of them."""
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

Ways = dict[str, Callable[[], object]]
COPY_FLOATS = 2**25  # 128 MiB
MATMUL_SIDE = {"cuda": 8192, "cpu": 1536}


class Times(NamedTuple):
    """Milliseconds over the rounds of one race."""
    median: float
    p20: float
    p80: float

    def per(self, count: int) -> "Times":
        """The times of one pass, if each round made `count`."""
        return Times(*(ms / count for ms in self))


def race(ways: Ways, rounds: int, device: torch.device,
         clock=time.perf_counter) -> tuple[dict[str, Times], dict[str, float]]:
    """The times of each way, and the median over the rounds of (its time / the first way's)."""
    samples = take_in_turn(ways, rounds, device, clock)
    first = next(iter(samples.values()))
    ratios = {name: statistics.median(b / a for a, b in zip(first, times, strict=True))
              for name, times in samples.items()}
    return {name: summary(times) for name, times in samples.items()}, ratios


def take_in_turn(ways: Ways, rounds: int, device: torch.device,
                 clock=time.perf_counter) -> dict[str, list[float]]:
    """{name: callable} -> {name: milliseconds of each round}.

    Calls each way once to warm up, then all in turn, `rounds` times. On CUDA a callable should
    only queue its work; the work is what is timed.
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


def summary(milliseconds: Sequence[float]) -> Times:
    ordered = sorted(milliseconds)
    return Times(statistics.median(ordered), ordered[int(0.2 * len(ordered))],
                 ordered[int(0.8 * len(ordered))])


def repeated(way: Callable, count: int) -> Callable:
    """A callable that does `way` count times.

    On a GPU the launches of one step hide behind the step before it, as they do in training.
    """
    return way if count == 1 else lambda: [way() for _ in range(count)]


def captured(step: Callable, inputs: Sequence, device: torch.device) -> Callable:
    """A callable that does step(x) for each x of `inputs`.

    On CUDA it replays one graph, so that launches take no time.
    """
    if device.type != "cuda":
        return lambda: [step(x) for x in inputs]

    # warm up on a side stream, as CUDA graphs require
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            for x in inputs:
                step(x)
    torch.cuda.current_stream(device).wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            step(x)
    return graph.replay


class Ceiling:
    """The best rates of a device: a large copy, and the fastest of its large matrix products.
    Neither fits a cache.

    Take `ways` in turn with what is compared to them. A `copy` reads and writes `bytes` in all, a
    `matmul` does `flops` floating-point operations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        source = torch.ones(COPY_FLOATS, device=device)
        target, side = torch.empty_like(source), MATMUL_SIDE[device.type]
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        products = {"mm": lambda: torch.mm(a, b, out=product)}
        if device.type == "cpu":  # oneDNN's product, which mm (MKL) reaches on Intel's CPUs alone
            image, kernel = a.view(1, side, side, 1), b.view(side, side, 1, 1)
            last = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
            products |= {"conv": partial(torch.conv2d, image, kernel),
                         "conv NHWC": partial(torch.conv2d, *last)}
        times, _ = race(products, 3, device)
        self.bytes, self.flops = 2 * source.nbytes, 2 * side**3
        self.ways = {"copy": lambda: target.copy_(source),
                     "matmul": products[min(times, key=lambda name: times[name].median)]}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read plus bytes written: the limit of a memory-bound kernel."""
    ceiling = Ceiling(device, torch.float32)
    times, _ = race({"copy": ceiling.ways["copy"]}, 9, device)
    return ceiling.bytes / times["copy"].median / 1e6
