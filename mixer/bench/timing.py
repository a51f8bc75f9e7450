"""Time several candidates in turn, so that a noisy machine is noisy for all of them."""
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

Candidates = dict[str, Callable[[], object]]
COPY_FLOATS = 2**25  # 128 MiB
MATMUL_SIDE = {"cuda": 8192, "cpu": 1536}


def race(candidates: Candidates, rounds: int, device: torch.device,
         count: int = 1) -> dict[str, dict[str, float]]:
    """{name: its row}: the median ms of a call, p20, p80, and how many times faster than the first
    candidate, by the median over the rounds of the ratio.
    """
    samples = take_in_turn(candidates, rounds, device, count)
    first = next(iter(samples.values()))
    ratios = {name: statistics.median(b / a for a, b in zip(first, times, strict=True))
              for name, times in samples.items()}
    return {name: {**percentiles(times), "faster": 1 / ratios[name]}
            for name, times in samples.items()}


def take_in_turn(candidates: Candidates, rounds: int, device: torch.device,
                 count: int = 1) -> dict[str, list[float]]:
    """{name: callable} -> {name: milliseconds of a call, for each round}.

    Calls each candidate once to warm up, then all in turn, `count` times each, `rounds` times. On
    CUDA the launches of one call hide behind the call before it, as they do in training.
    """
    synchronize = partial(getattr(torch, device.type).synchronize, device)
    for candidate in candidates.values():
        candidate()
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                candidate()
            synchronize()
            samples[name].append(1000 * (time.perf_counter() - start) / count)
    return samples


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile."""
    ordered = sorted(milliseconds)
    return {"ms": statistics.median(ordered), "p20": ordered[int(0.2 * len(ordered))],
            "p80": ordered[int(0.8 * len(ordered))]}


def captured(step: Callable, inputs: Sequence, device: torch.device) -> Callable:
    """A callable that does step(x) for each x of `inputs`.

    On CUDA it replays one graph, so that launches take no time.
    """
    def steps():
        for x in inputs:
            step(x)
    if device.type != "cuda":
        return steps

    # warm up on a side stream, as CUDA graphs require
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            steps()
    torch.cuda.current_stream(device).wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def large_copy(device: torch.device) -> tuple[Callable, float]:
    """A copy that fits no cache, and the GB that it reads and writes."""
    source = torch.ones(COPY_FLOATS, device=device)
    return partial(torch.empty_like(source).copy_, source), 2 * source.nbytes / 1e9


def large_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable, float]:
    """The fastest matrix product of the device that fits no cache, and its GFLOP."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = {"mm": partial(torch.mm, a, b, out=torch.empty_like(a))}
    if device.type == "cpu":  # oneDNN's product, which mm (MKL) reaches on Intel's CPUs alone
        image, kernel = a.view(1, side, side, 1), b.view(side, side, 1, 1)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (image, kernel)]
        products |= {"conv": partial(torch.conv2d, image, kernel),
                     "conv NHWC": partial(torch.conv2d, *last)}
    times = race(products, 3, device)
    return products[min(times, key=lambda name: times[name]["ms"])], 2 * side**3 / 1e9
